"""The kernels in torch's own operations.

The arithmetic of every kernel is that of `torch.lerp`: `average + weight * (source - average)` for a weight below one
half, `source - (source - average) * (1 - weight)` from there on. It leaves a finite average that equals its source as
it is, bit for bit but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.kernels.pieces import Batch, cut, scratch_for


def lerp_(averages: list[Tensor], sources: list[Tensor], weight: float) -> None:
    """Moves each average towards its source, in place: `average + weight * (source - average)`.

    A weight of 1 copies, whatever the average holds; a weight of 0 leaves it, whatever the source holds. All tensors
    of one pair have the same dtype and device.
    """
    if not averages or weight == 0.0:
        return
    if weight == 1.0:
        torch._foreach_copy_(averages, sources)
    else:
        torch._foreach_lerp_(averages, sources, weight)


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies each source into its target."""
    if targets:
        torch._foreach_copy_(targets, sources)


class Foreach:
    """Averages of the source's dtype on its device: one call for all tensors of a profile."""

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:
        self._sources, *self._columns = (list(column) for column in zip(*rows, strict=True))

    def lerp_(self, weights: Sequence[float]) -> None:
        """Moves the averages of each column towards the sources, with one weight a column."""
        for column, weight in zip(self._columns, weights, strict=True):
            lerp_(column, self._sources, weight)


class Staged:
    """Averages whose dtype or device is not the source's: the source goes through a scratch buffer, batch by batch.

    Each source is read and converted once, however many averages it has.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:
        average = rows[0][1]
        self._batches: list[Batch] = cut(rows, scratch_for(rows, average.dtype, average.device))

    def lerp_(self, weights: Sequence[float]) -> None:
        """Moves the averages of each column towards the sources, with one weight a column."""
        for batch in self._batches:
            sources, *averages = batch.columns
            torch._foreach_copy_(batch.scratch, sources)
            for column, weight in zip(averages, weights, strict=True):
                lerp_(column, batch.scratch, weight)
