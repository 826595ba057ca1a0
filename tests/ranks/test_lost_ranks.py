"""A rank that is lost, or does not answer, is a clear error on every other one, within a bounded time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

SUPPORT = Path(__file__).parents[1] / "support"
FAILED = "StateError: a message between ranks failed: one of them is lost, has raised an error, or has not made the"
SAID = {
    "lost_before_a_swap": FAILED,
    "lost_inside_of_a_swap": "StateError: the trained weights cannot be put back: each rank holds its share of them",
    "late_for_a_swap": FAILED,
    "lost_before_an_export": FAILED,
    "lost_before_a_report": FAILED,
    "destroyed_too_early": "{'StateErrorTrue'}",
    "lost_in_the_middle_of_a_save": "",
}

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not distributed.is_available(), reason="needs fork and torch.distributed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where three ranks, for each case, left what they were told."""
    folder = tmp_path_factory.mktemp("lost")
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(SUPPORT / "lost_ranks.py"), str(folder)]
    subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    return folder


@pytest.mark.protects
@pytest.mark.parametrize("name", SAID)
def test_the_others_are_told(folder, name):
    for rank in range(3 if name == "destroyed_too_early" else 2):
        found = json.loads((folder / f"{name}.{rank}.json").read_text())
        assert found["said"].startswith(SAID[name])
        assert "not expected" not in found["said"]
        assert found["said"] != "nothing was raised"
        assert found["intact"]
        assert found["seconds"] < 30
