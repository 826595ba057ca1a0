"""Sharded models in real processes: each rank averages its own shards, and all together are what one process has."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from torch import distributed

import ranks

SUPPORT = Path(__file__).parents[1] / "support"
MODULES = sorted(path.stem for path in SUPPORT.glob("sharded_*checks.py"))

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not distributed.is_available(), reason="needs fork and torch.distributed"
)


def _names():
    # The modules import what is slow, so their checks are found as text.
    for module in MODULES:
        lines = (SUPPORT / f"{module}.py").read_text().splitlines()
        for mark, definition in pairwise(lines):
            if mark.startswith("@on("):
                yield definition.removeprefix("def ").partition("(")[0], int(mark[4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes, which run all checks, left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, ranks.__file__, str(folder), *MODULES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    (folder / "output").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.protects
@pytest.mark.parametrize(("name", "size"), list(_names()))
def test_on_ranks(folder, name, size):
    for rank in range(size):
        path = folder / f"{name}.{rank}.json"
        assert path.exists(), f"not run, because another failed:\n{(folder / 'output').read_text()[-3000:]}"
        assert not (error := json.loads(path.read_text())["error"]), f"rank {rank}:\n{error}"
