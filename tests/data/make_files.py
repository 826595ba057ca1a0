"""Writes what other libraries save, with the libraries themselves, for the tests that read it.

python tests/data/make_files.py [case ...]

Each case is a folder of `tests/data/files`: the file or folder as the library wrote it, `expected.safetensors` with the
tensors that the library had in memory, and `about.json`. Every case runs in a process of its own, as some libraries
need a module that others must not see. Versions are in each `about.json`; `makers/requirements.txt` installs them.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from makers import diffusion, libraries, scripts, sharded, trainers
from makers.common import CASES, FILES

MODULES = (libraries, diffusion, trainers, sharded, scripts)


def make(name: str) -> None:
    """Writes one case to a temporary folder, which then takes the place of the old one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, besides = Path(temporary) / name, Path(temporary) / "besides"
        folder.mkdir()
        # What a library writes besides, to the folder that it is run in, is not kept.
        besides.mkdir()
        with contextlib.chdir(besides):
            CASES[name](folder)
        shutil.rmtree(FILES / name, ignore_errors=True)
        shutil.copytree(folder, FILES / name)


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.exit(f"no such case: {', '.join(unknown)}; there are {', '.join(sorted(CASES))}")
    if len(names) == 1:
        make(names[0])
        return
    failed = [name for name in names or CASES if subprocess.run([sys.executable, __file__, name]).returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
