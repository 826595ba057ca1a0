"""What pytest collects on other machines: one with a GPU, and without the libraries that tests compare with."""

import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Runs in a new process, because files ask for a GPU and for libraries when they are imported.
COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.modules.update(dict.fromkeys(("ema_pytorch", "torch_ema")))  # an import of these raises
raise SystemExit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]))
"""


@pytest.fixture(scope="module")
def collected():
    return subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.protects
def test_the_whole_suite_is_collected_without_the_libraries_that_it_compares_with(collected):
    assert collected.returncode == 0, collected.stdout + collected.stderr


@pytest.mark.protects
def test_all_tests_for_a_gpu_are_collected_where_there_is_one(collected):
    pytest.importorskip("triton")
    found = Counter(Path(line.partition("::")[0]).name for line in collected.stdout.splitlines() if "::" in line)
    least = {"test_gpu.py": 75, "test_gpu_cases.py": 33, "test_host_gpu.py": 65}
    assert found.keys() == least.keys()
    assert {name: count for name, count in found.items() if count < least[name]} == {}


@pytest.mark.parametrize(
    "message",
    [
        "Warning: Profiler clears events at the end of each cycle.",
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
    ],
)
def test_warnings_of_torch_2_11_are_no_errors(message):
    warnings.warn(message, UserWarning, stacklevel=1)
    with pytest.raises(UserWarning, match="of ours"):
        warnings.warn("of ours", UserWarning, stacklevel=1)
