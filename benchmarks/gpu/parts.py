"""The parts of a run on a GPU, the most valuable first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# What the parts import. The last five are the libraries that are compared.
PACKAGES = (
    *("torch", "triton", "pytest", "numpy", "safetensors", "rich", "typer", "transformers"),
    *("timm", "ema_pytorch", "torch_ema", "diffusers", "lightning"),
)

UPDATES = {
    "cuda": (
        "float32:llama-1b",
        "float32:small",
        "mixed:llama-1b",
        "compensated:llama-1b",
        "stochastic:llama-1b",
        "profiles:llama-1b",
    ),
    "cpu": ("float32:small", "mixed:small"),
}
OTHERS = {
    "cuda": (
        "mixed:small",
        "mixed:llama-7b",
        "float32:resnet50",
        "float32:vit",
        "float32:gpt2",
        "mixed:resnet50",
        "mixed:vit",
        "mixed:gpt2",
        "stochastic:small",
        "compensated:small",
        "profiles:small",
        "float32:llama-7b",
    ),
    "cpu": ("stochastic:small", "compensated:small", "profiles:small"),
}
TESTS = ("tests/kernels/test_gpu.py", "tests/kernels/test_gpu_cases.py", "tests/store/test_host_gpu.py")


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: for the command line.
        seconds: its time box.
        least: seconds that must be left for the part to be started.
        commands: returns the arguments for Python by the name of each process, given the device and the time box.
    """

    name: str
    seconds: float
    least: float
    commands: Callable[[str, float], Mapping[str, Sequence[str]]]


def smoke(device: str, seconds: float) -> dict[str, list[str]]:
    return {"smoke": ["-m", "benchmarks.gpu.smoke", device]}


def tests(device: str, seconds: float) -> dict[str, list[str]]:
    """One process for each test file, and one that reports the machine, which pytest does not."""
    return {"machine": ["-m", "benchmarks.gpu.about", device], **{Path(path).stem: pytest(path) for path in TESTS}}


def pytest(path: str) -> list[str]:
    """Prints the stack of a test that takes longer than a minute."""
    options = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
    options += ["-p", "benchmarks.gpu.pytest_plugin"]
    if find_spec("pytest_timeout"):
        options += ["-p", "pytest_timeout", "--timeout", "90"]
    return ["-m", "pytest", *options, path]


def updates(device: str, seconds: float) -> dict[str, list[str]]:
    return {"updates": measurements(device, seconds, UPDATES[device])}


def others(device: str, seconds: float) -> dict[str, list[str]]:
    return {"others": measurements(device, seconds, OTHERS[device])}


def measurements(device: str, seconds: float, names: Sequence[str]) -> list[str]:
    return ["-m", "benchmarks.gpu.updates", device, str(seconds), *names]


def host(device: str, seconds: float) -> dict[str, list[str]]:
    return {"host": ["-m", "benchmarks.gpu.host", device]}


PARTS = (
    Part("smoke", 60, 20, smoke),
    Part("tests", 200, 60, tests),
    Part("updates", 150, 40, updates),
    Part("host", 120, 70, host),
    Part("others", 150, 30, others),
)


def missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if find_spec(name) is None]
