"""Cuts the power, and prints as JSON what is on the disk after: `python -m crash.power FOLDER CUTS`.

A file system in a file is mounted. What was written, but not flushed, is in the memory of the kernel and not in that
file. So a copy of the file is the disk as a power cut leaves it, and mounting the copy is what happens when the power
comes back. A writer that flushes nothing shows that this finds what gets lost.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from .private import run_with_mounts
from .versions import KINDS, Sharded
from .writer import Writer

_DISK_BYTES = 24 << 20
_NUM_ELEMENTS = 1 << 16

WRONG = ("lost", "half-written", "failed writers")
COUNTED = ("cuts", "in the middle of a save", "whole", "between two", "saves that were finished", *WRONG)


def run(folder, *, cuts):
    """What `main` prints, of so many cuts for each kind of file.

    Raises:
        CannotMount: with the reason.
    """
    image = Path(folder) / "probe"
    point = Path(folder) / "disk"
    point.mkdir()
    _make_disk(image)
    return run_with_mounts(f"{__package__}.power", folder, cuts, probe=["mount", "-o", "loop", str(image), str(point)])


class Careless:
    """Another name and a rename, as many do it, without a flush."""

    name = "careless.pt"

    def __init__(self, num_elements):
        self._state = KINDS[0](num_elements)

    def write(self, path, version):
        temporary = Path(path).with_suffix(".new")
        torch.save({"version": version, "tensors": {}, "names": []}, temporary)
        temporary.rename(path)

    read = KINDS[0].read


def main(folder, cuts):
    torch.set_num_threads(1)
    chance = random.Random(0)
    print(json.dumps({kind.name: _cut(kind, Path(folder), int(cuts), chance) for kind in (*KINDS, Careless)}))


def _cut(kind, folder, cuts, chance):
    image, point = folder / "image", folder / "disk"
    _make_disk(image)
    # The file system flushes by itself only after longer than this takes.
    subprocess.run(["mount", "-o", "loop,commit=600", image, point], check=True)
    writer = Writer(kind(_NUM_ELEMENTS), point / kind.name, first=1, pause=0.005)
    writer.wait_until(writer.done)
    counts = dict.fromkeys(COUNTED, 0)
    for _ in range(cuts):
        time.sleep(chance.uniform(0, 0.1))
        writer.stop()
        shutil.copy(image, folder / "copy")
        begun, done = writer.begun(), writer.done()
        writer.go_on()
        counts["cuts"] += 1
        counts["in the middle of a save"] += begun != done
        counts[_look(kind, folder, begun=begun, done=done)] += 1
    counts["failed writers"] += not writer.kill()
    counts["saves that were finished"] += writer.num_done()
    subprocess.run(["umount", point], check=True)
    return counts


def _look(kind, folder, *, begun, done):
    """What stands after the power is back; a folder may be moved away already, and the next not yet there."""
    point = folder / "after"
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", folder / "copy", point], check=True)
    try:
        target = point / kind.name
        if not target.exists():
            return "between two" if kind is Sharded and begun != done else "lost"
        try:
            return "whole" if kind.read(target) in (begun, done) else "lost"
        except Exception:
            return "half-written"
    finally:
        subprocess.run(["umount", point], check=True)


def _make_disk(image):
    with open(image, "wb") as file:
        os.truncate(file.fileno(), _DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
