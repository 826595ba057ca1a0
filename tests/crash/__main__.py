"""`make crashtest`: kills writers, fills disks and cuts the power, and counts what was lost."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import disk, kills, power
from .private import CannotMount


def main(arguments):
    parser = argparse.ArgumentParser(prog="crashtest", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="how many writers are killed")
    parser.add_argument("--cuts", type=int, default=12, help="how often the power is cut, for each kind of file")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which they are killed")
    parser.add_argument("--folder", type=Path, help="where to write; default: where temporary files go")
    options = parser.parse_args(arguments)
    # A fork of a process with threads has only one of them.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rounds = (
            ("kill -9", "kills", lambda at: _kills(at, options)),
            ("a full disk", "disk", _disk),
            ("the power is cut", "power", lambda at: _power(at, options)),
        )
        clean = [_tell(title, _made(folder / part), round_) for title, part, round_ in rounds]
    return 0 if all(clean) else 1


def _tell(title, folder, round_):
    """Prints what a round counts, and gives whether nothing was lost."""
    start = time.perf_counter()
    try:
        lines, clean = round_(folder)
    except CannotMount as error:
        print(f"{title}: skipped, because {error}")
        return True
    print(f"{title}: {'nothing lost' if clean else 'LOST'} ({time.perf_counter() - start:.0f} s)")
    for line in lines:
        print(f"  {line}")
    return clean


def _kills(folder, options):
    counts = kills.run(folder, kills=options.kills, seed=options.seed)
    return [f"{counts[name]:5d} {name}" for name in kills.COUNTED], not any(counts[wrong] for wrong in kills.WRONG)


def _disk(folder):
    found = disk.run(folder)
    clean = [case["raised"] is not None and case["stands"] in (1, None) and not case["left"] for case in found]
    return [f"{sum(clean):5d} of {len(found)} saves refused or undone, the old file as it was"], all(clean)


def _power(folder, options):
    found = power.run(folder, cuts=options.cuts)
    lines = [
        f"{name}: {', '.join(f'{counts[what]} {what}' for what in counts if counts[what])}"
        for name, counts in found.items()
    ]
    # Where the careless writer loses nothing, the cuts are not what they should be.
    careless = found.pop(power.Careless.name)
    clean = all(not counts[wrong] for counts in found.values() for wrong in power.WRONG)
    return lines, clean and any(careless[wrong] for wrong in power.WRONG)


def _made(folder):
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
