"""Runs a module where it may mount file systems that nobody else sees, and that are gone when it ends."""

import json
import os
import shutil
import subprocess
import sys


class CannotMount(RuntimeError):  # noqa: N818  # it is a reason to skip, not a failure
    """With the reason."""


def run_with_mounts(module, *arguments, probe):
    """What `python -m module` prints with these arguments, from JSON.

    Raises:
        CannotMount: it is not Linux, or the command `probe` fails.
    """
    if not shutil.which("unshare"):
        raise CannotMount("there is no unshare: mounts that nobody else sees need Linux")
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    tried = subprocess.run([*alone, *probe], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise CannotMount(f"{' '.join(probe)}: {tried.stderr.strip()}")
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [*alone, sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)
