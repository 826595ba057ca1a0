"""The plan of an update: which tensors go through which kernel, decided once and run every time.

>>> plan = Plan([Row("weight", torch.ones(2), (torch.zeros(2),))], kernels=["foreach"])
>>> print(plan)
foreach: 1 tensor, 2 elements (same dtype and device): weight
>>> plan.run([0.25])
>>> plan.rows[0].averages[0]
tensor([0.2500, 0.2500])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.errors import listed
from polyak.kernels.eager import Foreach, Staged
from polyak.kernels.native import Native, is_supported, library

KERNELS = {"native": Native, "foreach": Foreach, "staged": Staged}

_MAX_NAMES = 4


@dataclass(frozen=True)
class Row:
    """One source tensor and its averages, one a profile; their name is for printing only."""

    name: str
    source: Tensor
    averages: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Group:
    kernel: str
    reason: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        names = ", ".join(row.name for row in self.rows[:_MAX_NAMES])
        more = f" and {len(self.rows) - _MAX_NAMES} more" if len(self.rows) > _MAX_NAMES else ""
        tensors = f"{len(self.rows)} tensor" + "s" * (len(self.rows) != 1)
        elements = sum(row.source.numel() for row in self.rows)
        return f"{self.kernel}: {tensors}, {elements} elements ({self.reason}): {names}{more}"


class Plan:
    """How to update a list of averages from their sources.

    `native` is the kernel in C, for contiguous tensors on a CPU. `foreach` takes the other pairs that are alike in
    dtype and device, all in one call; `staged` those that are not, through a scratch buffer. All have the same bits.
    Averages and sources are updated in place and must not be replaced.

    Args:
        rows: what to update.
        kernels: those that may be used, the first that fits is taken. Default: all; or those that the environment
            variable POLYAK_KERNELS names, separated by commas.

    Raises:
        ValueError: a kernel is unknown, or none of them fits a tensor.
    """

    def __init__(self, rows: Sequence[Row], *, kernels: Sequence[str] | None = None) -> None:
        self.rows = tuple(rows)
        allowed = _allowed(kernels)
        grouped: dict[tuple[str, str, torch.dtype, torch.dtype, torch.device], list[Row]] = {}
        for row in self.rows:
            kernel, reason = _choose(row, allowed)
            average = row.averages[0]
            key = (kernel, reason, row.source.dtype, average.dtype, average.device)
            grouped.setdefault(key, []).append(row)
        self.groups = tuple(_Group(kernel, reason, tuple(group)) for (kernel, reason, *_), group in grouped.items())
        self._runs = [
            KERNELS[group.kernel]([(row.source, *row.averages) for row in group.rows]).lerp_ for group in self.groups
        ]

    @torch.no_grad()
    def run(self, weights: Sequence[float]) -> None:
        """Updates every average; `weights` has one for each of a row's averages."""
        for run in self._runs:
            run(weights)

    def __str__(self) -> str:
        return "\n".join(map(str, self.groups))


def _allowed(kernels: Sequence[str] | None) -> list[str]:
    if kernels is None:
        named = os.environ.get("POLYAK_KERNELS", "")
        kernels = [name.strip() for name in named.split(",")] if named else list(KERNELS)
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        raise ValueError(f"there is no kernel {listed(unknown)}; the kernels are {listed(KERNELS)}")
    return list(kernels)


def _choose(row: Row, allowed: Sequence[str]) -> tuple[str, str]:
    source, average = row.source, row.averages[0]
    for kernel in allowed:
        if kernel == "native" and all(is_supported(source, each) for each in row.averages) and library() is not None:
            return kernel, "contiguous, on the CPU"
        if kernel == "foreach" and source.device == average.device and source.dtype == average.dtype:
            return kernel, "same dtype and device"
        if kernel == "staged":
            other = f"{source.dtype} to {average.dtype}" if source.dtype != average.dtype else "through scratch memory"
            return kernel, f"{source.device} to {average.device}" if source.device != average.device else other
    raise ValueError(
        f"no kernel of {listed(allowed)} fits {row.name!r}, {source.dtype} on {source.device} into {average.dtype} on "
        f"{average.device}"
    )
