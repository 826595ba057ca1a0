"""Updates in torch's own operations, the definition of each mode; and copies, in C where possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import native
from .modes import Sources, lerp_
from .pieces import copy_, cut, scratch_for
from .rounding import draw
from .row import Row


class Foreach:
    """Plain averages of the source's dtype on its device: one call for all tensors of a profile."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._sources, *self._columns = map(list, zip(*(row.tensors for row in rows), strict=True))

    @torch.no_grad()
    def run(self, weights: Sequence[float], step: int) -> None:
        """Moves the averages of each column towards the sources, with one weight a column."""
        for column, weight in zip(self._columns, weights, strict=True):
            lerp_(column, self._sources, weight)


class Staged:
    """Averages of another dtype or device than the source, or of another mode than plain.

    What is needed of them goes through a scratch buffer, batch by batch. Each source is read and converted once,
    however many averages it has.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        average = rows[0].averages[0]
        self._mode = rows[0].mode
        self._num_averages = len(rows[0].averages)
        columns = [row.tensors for row in rows]
        scratch = scratch_for(columns, self._mode.computes_in(average.dtype), average.device)
        self._batches = [
            (batch, Sources(batch.scratch, scratch[: batch.num_elements])) for batch in cut(columns, scratch)
        ]
        # The key of each tensor, and the place of its memory's first element.
        self._origins = [(row.key, row.first - int(row.averages[0].storage_offset())) for row in rows]

    @torch.no_grad()
    def run(self, weights: Sequence[float], step: int) -> None:
        """Moves the averages of each column towards the sources, with one weight a column."""
        for batch, sources in self._batches:
            its_sources, averages = batch.columns[0], batch.columns[1 : 1 + self._num_averages]
            beside = batch.columns[1 + self._num_averages :] or [[]] * self._num_averages
            copy_(batch.scratch, its_sources)
            if self._mode.draws:
                sources = sources._replace(words=draw(batch, self._origins, step))
            for column, weight in enumerate(weights):
                if weight != 0.0:
                    self._mode.move(averages[column], beside[column], sources, weight=weight)


class Copies:
    """Copies each source into its target, whatever their dtypes, devices and layouts.

    Args:
        targets: what is written; it must not be replaced.
        sources: of the same shapes.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        in_c: list[tuple[Tensor, Tensor]] = []
        usable = native.is_usable()
        for target, source in zip(targets, sources, strict=True):
            if usable and target.dtype == source.dtype and native.is_reachable(target, source):
                in_c.append((target, source))
            else:
                self._targets.append(target)
                self._sources.append(source)
        self._in_c: Callable[[], None] | None = native.copy(in_c) if in_c else None

    def run(self) -> None:
        """Makes all of them."""
        if self._in_c is not None:
            self._in_c()
        if self._targets:
            with torch.no_grad():
                copy_(self._targets, self._sources)
