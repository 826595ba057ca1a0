"""Tensors cut into chunks, as the C functions go through them."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor

# Elements of one row of a table: a chunk of the source stays in the cache while all its averages are updated.
CHUNK_ELEMENTS = 1 << 14


class Work(ctypes.Structure):
    """The structure of this name in common.h: how threads share the chunks of a table.

    Args:
        counts: the elements of each chunk.
    """

    _fields_ = (("num_chunks", ctypes.c_int64), ("num_threads", ctypes.c_int64), ("ends", ctypes.c_void_p))

    def __init__(self, counts: Tensor) -> None:
        self._ends = counts.cumsum(0)  # the address stays valid as long as this lives
        super().__init__(len(counts), 1, self._ends.data_ptr())


@dataclass(frozen=True)
class Chunks:
    """Rows of corresponding tensors, cut into chunks.

    Attributes:
        rows: for each chunk, the number of its row.
        starts: its first element.
        counts: how many elements it has.
        addresses: where it is in each tensor of the row; one column for each.
    """

    rows: Tensor
    starts: Tensor
    counts: Tensor
    addresses: Tensor


def integers(values: Iterable[int]) -> Tensor:
    """A tensor of int64 on the CPU, made several times as fast as by `torch.tensor` from a list.

    Example:
        >>> integers([1, 2])
        tensor([1, 2])
    """
    found = array("q", values)
    return torch.frombuffer(found, dtype=torch.int64) if found else torch.empty(0, dtype=torch.int64, device="cpu")


def cut_into_chunks(rows: Sequence[Sequence[Tensor]], firsts: Sequence[int] | None = None) -> Chunks:
    """Cuts rows of corresponding tensors, each of one size.

    Args:
        rows: tensors that belong together.
        firsts: for each row the number of its first element in a whole, whose chunks it shares. Default: 0.
    """
    columns = list(zip(*rows, strict=True))
    sizes = integers(map(Tensor.numel, columns[0]))
    before = integers(firsts or [0] * len(rows)) % CHUNK_ELEMENTS
    num_chunks = torch.where(sizes > 0, (before + sizes + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS, 0)
    # Not by `repeat_interleave`, which waits for threads that a forked process does not have.
    row = integers(chain.from_iterable(map(repeat, range(len(rows)), map(int, num_chunks))))
    number = torch.arange(len(row), device="cpu") - (num_chunks.cumsum(0) - num_chunks)[row]
    starts = (number * CHUNK_ELEMENTS - before[row]).clamp_(min=0)
    ends = torch.minimum((number + 1) * CHUNK_ELEMENTS - before[row], sizes[row])
    bases = torch.stack([integers(map(Tensor.data_ptr, column)) for column in columns], dim=1)
    widths = torch.stack([integers(map(Tensor.element_size, column)) for column in columns], dim=1)
    return Chunks(row, starts, ends - starts, bases[row] + starts[:, None] * widths[row])
