"""The kernels in torch's own operations.

The arithmetic of every kernel is that of `torch.lerp`: `average + weight * (source - average)` for a weight below one
half, `source - (source - average) * (1 - weight)` from there on. It leaves a finite average that equals its source as
it is, bit for bit but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fractions
from .noise import draw
from .pieces import Batch, cut, like, scratch_for
from .rounding import round_stochastically
from .row import Row


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
    if any(map(Tensor.is_conj, targets)) or any(map(Tensor.is_neg, targets)):
        # Grouped operations do not write to conjugate and negative views.
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    elif targets:
        torch._foreach_copy_(targets, sources)


class Foreach:
    """Averages of the source's dtype on its device: one call for all tensors of a profile."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._sources, *self._columns = map(list, zip(*(row.tensors for row in rows), strict=True))

    @torch.no_grad()
    def run(self, weights: Sequence[float], step: int) -> None:
        """Moves the averages of each column towards the sources, with one weight a column."""
        for column, weight in zip(self._columns, weights, strict=True):
            lerp_(column, self._sources, weight)


class Staged:
    """Averages of another dtype or device than the source, or of another mode than plain.

    What is needed of them goes through scratch buffers, batch by batch. Each source is read and converted once, however
    many averages it has.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        first = rows[0].averages[0]
        self._num_averages = len(rows[0].averages)
        self._mode = rows[0].mode
        self._dtype = first.dtype
        wide = torch.float32 if self._mode == "stochastic" else first.dtype
        columns = [row.tensors for row in rows]
        scratch = scratch_for(columns, wide, first.device)
        self._batches: list[Batch] = cut(columns, scratch)
        self._scratch = [scratch] if self._mode == "plain" else [scratch, torch.empty_like(scratch)]
        self._rows = rows

    @torch.no_grad()
    def run(self, weights: Sequence[float], step: int) -> None:
        """Moves the averages of each column towards the sources, with one weight a column."""
        for batch in self._batches:
            sources = batch.columns[0]
            averages = batch.columns[1 : 1 + self._num_averages]
            seconds = batch.columns[1 + self._num_averages :]
            copy_(batch.scratch, sources)
            random = draw(batch, self._rows, step) if self._mode == "stochastic" else None
            for column, weight in enumerate(weights):
                if weight == 0.0:
                    continue
                if self._mode == "plain":
                    lerp_(averages[column], batch.scratch, weight)
                elif self._mode == "compensated":
                    self._compensated(batch, averages[column], seconds[column], weight)
                elif random is not None:
                    self._stochastic(batch, averages[column], weight, random)

    def _compensated(self, batch: Batch, averages: list[Tensor], seconds: list[Tensor], weight: float) -> None:
        source, average = (flat[: batch.num_elements] for flat in self._scratch)
        if weight == 1.0:
            copy_(averages, batch.scratch)
            torch._foreach_zero_(seconds)
            return
        copy_(like(batch.scratch, average), averages)
        short = torch.empty(batch.num_elements, dtype=fractions.DTYPE, device=average.device)
        copy_(like(batch.scratch, short), seconds)
        update = fractions.from_fractions(short, average).lerp_(source - average, weight)
        new = average + update
        copy_(averages, like(batch.scratch, new))
        copy_(seconds, like(batch.scratch, fractions.to_fractions(average.sub_(new).add_(update), new)))

    def _stochastic(self, batch: Batch, averages: list[Tensor], weight: float, random: Tensor) -> None:
        source, average = (flat[: batch.num_elements] for flat in self._scratch)
        if weight == 1.0:
            # A NaN with bits in its lower half only would be truncated to an infinity.
            high, low = source.masked_fill(source.isnan(), torch.nan), torch.zeros_like(source)
        else:
            copy_(like(batch.scratch, average), averages)
            high = torch.lerp(average, source, weight)
            short = float(torch.tensor(weight, dtype=torch.float32))
            base, factor = (average, short) if short < 0.5 else (source, short - 1.0)
            low = (source - average).mul_(factor).sub_(high - base)
        copy_(averages, like(batch.scratch, round_stochastically(high, low, random, self._dtype)))
