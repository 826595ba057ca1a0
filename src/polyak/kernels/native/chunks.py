"""Tensors cut into chunks, as the C functions go through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of one row of a table: a chunk of the source stays in the cache while all its averages are updated.
CHUNK_ELEMENTS = 1 << 14


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


def cut_into_chunks(rows: Sequence[Sequence[Tensor]], firsts: Sequence[int] | None = None) -> Chunks:
    """Cuts rows of corresponding tensors, each of one size.

    Args:
        rows: tensors that belong together.
        firsts: for each row the number of its first element in a whole, whose chunks it shares. Default: 0.
    """
    sizes = torch.tensor([row[0].numel() for row in rows], device="cpu")
    before = torch.tensor(firsts or [0] * len(rows), device="cpu") % CHUNK_ELEMENTS
    num_chunks = torch.where(sizes > 0, (before + sizes + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS, 0)
    row = torch.arange(len(rows), device="cpu").repeat_interleave(num_chunks)
    number = torch.arange(len(row), device="cpu") - (num_chunks.cumsum(0) - num_chunks)[row]
    starts = (number * CHUNK_ELEMENTS - before[row]).clamp_(min=0)
    ends = torch.minimum((number + 1) * CHUNK_ELEMENTS - before[row], sizes[row])
    bases = torch.tensor([[tensor.data_ptr() for tensor in each] for each in rows], device="cpu")
    widths = torch.tensor([[tensor.element_size() for tensor in each] for each in rows], device="cpu")
    return Chunks(row, starts, ends - starts, bases[row] + starts[:, None] * widths[row])
