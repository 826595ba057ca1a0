"""A short run of `make crashtest`, and what a writer says whose disk is full."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crash import disk
from crash.power import Careless
from crash.private import CannotMount
from crash.versions import KINDS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed by signals")


@pytest.fixture(scope="module")
def told():
    """What `make crashtest` prints, called as it calls it, from the folder of the repository."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.crash", "--kills", "10", "--cuts", "2"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LOST" not in done.stdout
    return done.stdout


@pytest.mark.protects
def test_nothing_is_lost(told):
    assert "kill -9: nothing lost" in told
    counts = {what: int(count) for count, what in re.findall(r"^ +(\d+) (.+)$", told, re.MULTILINE)}
    assert counts["kills"] >= 10
    assert counts["in the middle of a save"] > 0
    assert counts["lost"] == counts["half-written"] == counts["failed writers"] == counts["leftovers that stayed"] == 0


@pytest.mark.protects
def test_nothing_is_lost_with_the_power(told):
    skipped = re.search("the power is cut: skipped, because (.+)", told)
    if skipped is not None:
        pytest.skip(f"no disk can be mounted: {skipped[1]}")
    cuts = re.findall(r"^  (\S+): 2 cuts", told.partition("the power is cut: nothing lost")[2], re.MULTILINE)
    assert cuts == [*(kind.name for kind in KINDS), Careless.name]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    try:
        found = disk.run(tmp_path_factory.mktemp("disk"))
    except CannotMount as reason:
        pytest.skip(f"a small disk cannot be mounted: {reason}")
    return {(case["kind"], case["told"]): case for case in found}


@pytest.mark.protects
@pytest.mark.parametrize("kind", ["state.pt", "export.safetensors", "sharded"])
@pytest.mark.parametrize("told", [True, False], ids=["seen before", "seen while writing"])
def test_a_full_disk(cases, kind, told):
    case = cases[kind, told]
    assert case["raised"]["errno"] == errno.ENOSPC
    found = re.fullmatch(
        r"\[Errno 28\] '(.+)' cannot be written, and is as it was: it needs ([\d,]+) bytes, and ([\d,]+) are free in "
        r"'(.+)'; make room for ([\d,]+) more",
        case["raised"]["message"],
    )
    assert found is not None, case["raised"]["message"]
    path, *numbers, folder, missing = (
        int(text.replace(",", "")) if text[0].isdigit() else text for text in found.groups()
    )
    needed, free = numbers
    assert (Path(path).name, path) == (kind, f"{folder}/{kind}")
    assert needed >= 1 << 22
    assert 0 < free <= 1 << 22
    assert missing == needed - free
    assert case["stands"] == (None if kind == "sharded" else 1)
    assert case["left"] == []
