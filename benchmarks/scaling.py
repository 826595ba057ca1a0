"""How the time of one update grows with the number of parameters, and with the number of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.contender import Kind
from benchmarks.shapes import Shape, one_tensor, small_tensors
from benchmarks.suites import FLOAT32, Suite
from benchmarks.update import measure

# Two of timm's classes and torch's default buffers cost as the formula that stands for them here.
DRAWN = (
    "polyak.WeightAverage",
    "timm ModelEmaV3",
    "torch AveragedModel",
    "ema-pytorch",
    "torch-ema",
    "diffusers EMAModel",
    "Lightning EMAWeightAveraging",
    "the seed's formula",
)
ROUNDS = 5
CALLS = 3


@dataclass(frozen=True)
class Curve:
    """Median milliseconds of each contender, for each size."""

    title: str
    sizes: list[int]
    milliseconds: dict[str, list[float]]
    limit: str


def shapes_by_parameters() -> list[Shape]:
    sizes = (1 << 10, 1 << 13, 1 << 16, 1 << 19, 1 << 22, 1 << 24)
    return [
        Shape("one", f"one tensor of {size}", 1, ROUNDS, partial(one_tensor, size), num_calls=CALLS) for size in sizes
    ]


def shapes_by_tensors() -> list[Shape]:
    counts = (10, 30, 100, 300, 1000, 3000, 10000)
    return [
        Shape("many", f"{count} tensors", count, ROUNDS, partial(small_tensors, count), num_calls=CALLS)
        for count in counts
    ]


def curve(
    title: str, shapes: Sequence[Shape], *, by_entries: bool, device: str = "cpu", suite: Suite = FLOAT32
) -> Curve:
    contenders = [
        contender
        for contender in suite.all_contenders(torch.device(device))
        if contender.name in DRAWN or contender.kind is Kind.LIMIT
    ]
    measured = [measure(suite, shape, device=device, contenders=contenders) for shape in shapes]
    times = {
        contender.name: [row.time.median for each in measured if (row := each.row(contender.name))]
        for contender in contenders
    }
    return Curve(
        title,
        [each.shape.entries if by_entries else each.parameters for each in measured],
        # Only contenders that were timed at every size.
        {name: each for name, each in times.items() if len(each) == len(measured)},
        next(contender.name for contender in contenders if contender.kind is Kind.LIMIT),
    )


def curves(device: str = "cpu") -> list[Curve]:
    return [
        curve("parameters, in one tensor", shapes_by_parameters(), by_entries=False, device=device),
        curve("tensors of 32x32", shapes_by_tensors(), by_entries=True, device=device),
    ]
