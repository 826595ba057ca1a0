"""Kills writers at random moments, and looks at what they leave."""

import os
import random
import shutil
import time
from pathlib import Path

from .versions import KINDS, Sharded
from .writer import Writer

_SIZES = (1 << 10, 1 << 16, 1 << 19)
WRONG = ("lost", "half-written", "failed writers", "leftovers that stayed")
COUNTED = (
    "kills",
    "in the middle of a save",
    "with a temporary file there",
    "after the new version was in place",
    "of one of two writers",
    "saves that were finished",
    "leftovers removed",
    *WRONG,
)


def run(folder, *, kills, seed):
    """Kills so many writers of each kind in turn, every third time one of two that write the same file."""
    chance = random.Random(seed)
    counts = dict.fromkeys(COUNTED, 0)
    # Of each kind, the version that stands, and the newest that was begun; a slow writer may write the older one last.
    standing = dict.fromkeys(KINDS, 0)
    newest = dict.fromkeys(KINDS, 0)
    leftovers = set()
    while counts["kills"] < kills:
        kind = chance.choice(KINDS)
        first = newest[kind] + 1
        target = Path(folder) / kind.name
        # A folder is not replaced, so two writers of one are not asked for.
        num_writers = 2 if kind is not Sharded and chance.random() < 1 / 3 else 1
        writers = [
            Writer(kind(chance.choice(_SIZES)), target, first=first + number, step=num_writers)
            for number in range(num_writers)
        ]
        for writer in writers:
            writer.wait_until(writer.begun)
        for writer in writers:
            time.sleep(chance.uniform(0, 0.04))
            counts["failed writers"] += not writer.kill()
            counts["kills"] += 1
        counts["in the middle of a save"] += sum(writer.is_in_the_middle() for writer in writers)
        counts["of one of two writers"] += num_writers if num_writers > 1 else 0
        counts["saves that were finished"] += sum(writer.num_done() for writer in writers)
        counts["with a temporary file there"] += len(_leftovers(folder) - leftovers)
        leftovers |= _leftovers(folder)
        standing[kind] = _look(kind, target, writers, counts, before=standing[kind])
        newest[kind] = max(writer.begun() for writer in writers)
        shutil.rmtree(target.with_name("away"), ignore_errors=True)
    for kind in KINDS:
        kind(_SIZES[0]).write(Path(folder) / kind.name, newest[kind] + 1)
    counts["leftovers that stayed"] = len(_leftovers(folder))
    counts["leftovers removed"] = len(leftovers - _leftovers(folder))
    return counts


def _look(kind, target, writers, counts, *, before):
    """The version that stands, 0 for none; counts it as wrong where it is not among those that can stand."""
    possible = {version for writer in writers for version in (writer.begun(), writer.done()) if version}
    may_be_missing = False
    if not any(writer.done() for writer in writers):
        possible.add(before)
        may_be_missing = not before
    if kind is Sharded:
        # Its writer moves the old folder away, and may have come as far as that.
        may_be_missing = writers[0].is_in_the_middle()
    if not target.exists():
        counts["lost"] += not may_be_missing
        return 0
    try:
        version = kind.read(target)
    except Exception as error:
        counts["half-written"] += 1
        print(f"{target}: {error!r}")
        return 0
    if version not in possible:
        counts["lost"] += 1
        print(f"{target}: version {version} stands, and one of {sorted(possible)} was to be expected")
    counts["after the new version was in place"] += any(writer.done() < version == writer.begun() for writer in writers)
    return version


def _leftovers(folder):
    return {name for name in os.listdir(folder) if name.startswith(".") and name.endswith(".tmp")}
