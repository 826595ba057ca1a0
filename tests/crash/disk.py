"""Saves to a disk that is too small, and prints as JSON what happened: `python -m crash.disk FOLDER`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from .private import run_with_mounts
from .versions import KINDS

_DISK_BYTES = 4 << 20
_FITS, _TOO_MUCH = 1 << 17, 1 << 20


def run(folder):
    """What `main` prints.

    Raises:
        CannotMount: with the reason.
    """
    return run_with_mounts(f"{__package__}.disk", folder, probe=["mount", "-t", "tmpfs", "none", str(folder)])


def main(folder):
    folder = Path(folder)
    found = []
    for told in (True, False):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", folder], check=True)
        for kind in KINDS:
            found.append({"kind": kind.name, "told": told, **_fill(kind, folder / kind.name, told=told)})
        subprocess.run(["umount", folder], check=True)
    print(json.dumps(found))


def _fill(kind, target, *, told):
    """Saves what fits and then what does not.

    Args:
        kind: a class of `versions`.
        target: the file or folder.
        told: whether the disk tells how much is free. If not, only the writing itself shows that it is full.
    """
    kind(_FITS).write(target, 1)
    usage = shutil.disk_usage
    if not told:
        shutil.disk_usage = lambda folder: usage(folder)._replace(free=1 << 50)
    try:
        kind(_TOO_MUCH).write(target, 2)
        raised = None
    except OSError as error:
        raised = {"errno": error.errno, "message": str(error)}
    finally:
        shutil.disk_usage = usage
    # A writer of a folder has moved the old one away.
    stands = kind.read(target) if target.exists() else None
    left = [entry.name for entry in target.parent.iterdir() if entry.name.startswith(".")]
    remove = shutil.rmtree if target.is_dir() else Path.unlink
    if target.exists():
        remove(target)
    return {"raised": raised, "stands": stands, "left": left}


if __name__ == "__main__":
    main(sys.argv[1])
