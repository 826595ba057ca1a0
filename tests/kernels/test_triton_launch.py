"""Launches of the kernels in Triton without a GPU: `launch_cases`, with a stand-in for the driver."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


def needed():
    """What the test needs, with the path of each."""
    found = importlib.util.find_spec("triton")
    nvidia = Path(found.origin).parent / "backends" / "nvidia" if found and found.origin else Path("triton")
    return {
        "Triton for NVIDIA": nvidia / "driver.py",
        "the assembler ptxas": nvidia / "bin" / "ptxas",
        "the header cuda.h": nvidia / "include" / "cuda.h",
        "the header Python.h": Path(sysconfig.get_paths()["include"]) / "Python.h",
        "a C compiler": Path(shutil.which("gcc") or "gcc"),
    }


MISSING = [name for name, path in needed().items() if not path.exists()]


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_all_launches_reach_the_driver(tmp_path):
    library = tmp_path / "libcuda.so.1"
    include = f"-I{needed()['the header cuda.h'].parent}"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", include, str(SUPPORT / "libcuda.c")]
    subprocess.run([*command, "-o", str(library)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUPPORT / "launch_cases.py")],
        env={
            **environment,
            "CC": "gcc",
            "LD_LIBRARY_PATH": os.pathsep.join([str(tmp_path), os.environ.get("LD_LIBRARY_PATH", "")]),
            "TRITON_LIBCUDA_PATH": str(tmp_path),
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        },
        cwd=SUPPORT.parents[1],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
