"""The plan of an update: which tensors go through which kernel, decided once and run every time.

>>> plan = Plan([Row("weight", torch.ones(2), (torch.zeros(2),))])
>>> print(plan)
foreach: 1 tensor, 2 elements (same dtype and device): weight
>>> plan.run([0.25])
>>> plan.rows[0].averages[0]
tensor([0.2500, 0.2500])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.kernels import eager

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

    `foreach` takes the pairs that are alike in dtype and device, all in one call; `staged` those that are not,
    through a scratch buffer. Averages and sources are updated in place and must not be replaced.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        grouped: dict[tuple[str, str, torch.dtype, torch.device], list[Row]] = {}
        for row in self.rows:
            average = row.averages[0]
            grouped.setdefault((*_choose(row.source, average), average.dtype, average.device), []).append(row)
        self.groups = tuple(_Group(kernel, reason, tuple(group)) for (kernel, reason, *_), group in grouped.items())
        self._foreach = [
            ([row.source for row in group.rows], [list(column) for column in zip(*_averages(group), strict=True)])
            for group in self.groups
            if group.kernel == "foreach"
        ]
        self._staged = [
            eager.Staged([(row.source, *row.averages) for row in group.rows])
            for group in self.groups
            if group.kernel == "staged"
        ]

    @torch.no_grad()
    def run(self, weights: Sequence[float]) -> None:
        """Updates every average; `weights` has one for each of a row's averages."""
        for sources, columns in self._foreach:
            for column, weight in zip(columns, weights, strict=True):
                eager.lerp_(column, sources, weight)
        for staged in self._staged:
            staged.lerp_(weights)

    def __str__(self) -> str:
        return "\n".join(map(str, self.groups))


def _averages(group: _Group) -> list[tuple[Tensor, ...]]:
    return [row.averages for row in group.rows]


def _choose(source: Tensor, average: Tensor) -> tuple[str, str]:
    if source.device != average.device:
        return "staged", f"{source.device} to {average.device}"
    if source.dtype != average.dtype:
        return "staged", f"{source.dtype} to {average.dtype}"
    return "foreach", "same dtype and device"
