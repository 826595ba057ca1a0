"""One source tensor and its averages: what a kernel is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .modes import Mode, plain


class Row(NamedTuple):
    """One source tensor and its averages, one a profile.

    Attributes:
        name: for printing.
        source: of any floating-point or complex dtype.
        averages: of the shape of the source, all of one dtype.
        mode: how the averages are moved and rounded.
        beside: what the mode keeps beside each average, if anything; of complex averages as pairs of real numbers.
        key: what makes the random bits of this tensor its own, if the mode draws.
        first: the number of the averages' first element in the whole tensor, where they are a part of it.
        strides: of the whole tensor, where they are a part of it that is to be updated in stretches without gaps.
    """

    name: str
    source: Tensor
    averages: tuple[Tensor, ...]
    mode: Mode = plain
    beside: tuple[Tensor, ...] = ()
    key: int = 0
    first: int = 0
    strides: tuple[int, ...] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Source, averages, and what is kept beside them."""
        return (self.source, *self.averages, *self.beside)


def real_rows(row: Row) -> list[Row]:
    """The row with complex numbers as pairs of real ones, in the same memory; kernels know no others.

    Example:
        >>> row = Row("x", torch.tensor([1 + 2j]), (torch.zeros(1, dtype=torch.complex64),))
        >>> [real.source.tolist() for real in real_rows(row)]
        [[[1.0, 2.0]]]
    """
    if not row.source.is_complex():
        return [row] if row.strides is None else list(_stretches(row, row.strides))
    if not any(tensor.is_conj() for tensor in row.tensors):
        as_pairs = torch.view_as_real
        return [row._replace(source=as_pairs(row.source), averages=tuple(map(as_pairs, row.averages)))]
    # A conjugate view shares the memory of what it negates, so its halves go by themselves.
    beside = [tuple(pairs[..., half] for pairs in row.beside) for half in range(2)]
    return [
        row._replace(source=row.source.real, averages=tuple(a.real for a in row.averages), beside=beside[0]),
        row._replace(source=row.source.imag, averages=tuple(a.imag for a in row.averages), beside=beside[1]),
    ]


def _stretches(row: Row, strides: tuple[int, ...]) -> Iterator[Row]:
    """A part of a tensor, cut so that elements which follow one another in it do so in the whole, too.

    Example:
        >>> part = torch.zeros(2, 2)
        >>> [each.first for each in _stretches(Row("x", part, (part,), key=1, first=1), (4, 1))]
        [1, 5]
    """
    part = row.averages[0]
    gaps = [d for d in range(part.dim()) if part.shape[d] > 1 and part.stride(d) != strides[d]]
    if part.numel() == 0 or not gaps:
        yield row._replace(strides=None)
        return
    # What is taken away last is what lies nearest in memory, of which the fewest stretches are cut.
    dimension = max(gaps, key=lambda d: part.stride(d))
    rest = strides[:dimension] + strides[dimension + 1 :]
    for number in range(part.shape[dimension]):
        cut = row._replace(
            source=row.source.select(dimension, number),
            averages=tuple(average.select(dimension, number) for average in row.averages),
            beside=tuple(each.select(dimension, number) for each in row.beside),
            first=row.first + number * strides[dimension],
        )
        yield from _stretches(cut, rest)
