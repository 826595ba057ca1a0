"""Reports what to know first about a GPU: `python -m benchmarks.gpu.smoke cuda`.

Is the kernel in Triton used? Are averages equal to those on the CPU, bit for bit? How fast are copies?
"""

import sys
import time
import traceback
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import polyak
from benchmarks import machine
from benchmarks.gpu.emit import emit
from benchmarks.table import Table
from polyak.kernels.gpu import launch

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compensated": {"compensated": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}
SOURCES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = tuple(product(MODES, SOURCES))
SAME = "same"
SIZES = {"cuda": (1 << 28, 1 << 30, 1 << 32), "cpu": (1 << 24, 1 << 26)}  # bytes
NUM_UPDATES = 3
NUM_COPIES = 10


def main(device: torch.device) -> int:
    """Returns the number of failures."""
    emit(machine=machine.describe(device.type))
    problem = kernel_problem(device)
    if problem:
        emit(failure=f"the kernel in Triton is not used: {problem}")
    rows = [(mode, str(source).removeprefix("torch."), *bits(mode, source, device)) for mode, source in PAIRS]
    wrong = [row for row in rows if row[-1] != SAME]
    for mode, source, _, found in wrong:
        emit(failure=f"{mode} average of {source}: {found}")
    emit(
        bits=[dict(zip(("mode", "source", "kernel", "bits"), row, strict=True)) for row in rows],
        table=asdict(Table("Averages against those of a CPU", ("mode", "source", "kernel", "bits"), rows, num_text=4)),
    )
    copies = rates(device)
    shown = [(name, f"{rate / 1e9:.1f}") for name, rate in copies.items()]
    emit(copies=copies, table=asdict(Table("Rates of copies", ("", "GB/s"), shown)))
    return bool(problem) + len(wrong)


def kernel_problem(device: torch.device) -> str:
    """Why the kernel in Triton is not used on a GPU; empty if it is used."""
    if device.type == "cpu":
        return ""
    started = time.monotonic()
    problem = launch._problem_on(torch.device(device.type, torch.cuda.current_device()))
    print(f"the first kernels were compiled in {time.monotonic() - started:.1f} s", flush=True)
    return problem


def bits(mode: str, source: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The kernel that updates the averages of a small model, and how they compare with the same averages on the CPU."""
    try:
        return compared(mode, source, device)
    except Exception as error:
        traceback.print_exc()
        return "", f"{type(error).__name__}: {error}"


def compared(mode: str, source: torch.dtype, device: torch.device) -> tuple[str, str]:
    torch.manual_seed(0)
    twin = nn.Linear(333, 77).to(source)
    model = nn.Linear(333, 77).to(source).to(device)
    model.load_state_dict(twin.state_dict())
    averages = [polyak.WeightAverage(each, polyak.Exponential(0.9), **MODES[mode]) for each in (model, twin)]
    for _ in range(NUM_UPDATES):
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
                other.add_(torch.randn(other.shape).to(source))
                parameter.copy_(other)
        for average in averages:
            average.update()
    found, right = (average.weights() for average in averages)
    is_same = all(torch.equal(found[name].cpu(), right[name]) for name in right)
    return averages[0].plan.groups[0].kernel, SAME if is_same else "other bits than on the CPU"


def rates(device: torch.device) -> dict[str, float]:
    """Bytes a second, by what is copied."""
    found: dict[str, float] = {}
    for size in SIZES[device.type]:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        found[f"{size >> 20} MiB on the device, read and written"] = 2 * copy_rate(source, torch.empty_like(source))
    if device.type == "cuda":
        source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
        pinned = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
        found["256 MiB to pinned memory"] = copy_rate(source, pinned)
    return found


def copy_rate(source: Tensor, target: Tensor) -> float:
    """Bytes a second of the fastest of several copies."""
    seconds: list[float] = []
    for _ in range(NUM_COPIES):
        finish(source.device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        finish(source.device)
        seconds.append(time.perf_counter() - started)
    return source.nbytes / min(seconds)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(min(1, main(torch.device(sys.argv[1]))))
