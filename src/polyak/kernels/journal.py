"""Copies that can be interrupted at any point and finished afterwards; the exchange of two lists is one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.kernels.pieces import cut, scratch_elements

Copy = tuple[list[Tensor], list[Tensor]]


class Journal:
    """A sequence of copies, and how many of them are done.

    Each copy may be repeated as long as the next has not begun, so whoever is interrupted in `run` (Ctrl-C included)
    calls it again, and it goes on where it was: no value is lost.
    """

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = list(copies)
        self._num_done = 0

    @property
    def started(self) -> bool:
        """Whether a copy may have changed anything but scratch memory."""
        return self._num_done > 0

    @torch.no_grad()
    def run(self) -> None:
        """Does the copies that are left."""
        while self._num_done < len(self._copies):
            targets, sources = self._copies[self._num_done]
            if targets:
                torch._foreach_copy_(targets, sources)
            self._num_done += 1


def exchange_copies(one: list[Tensor], other: list[Tensor]) -> list[Copy]:
    """The copies that exchange the values of corresponding tensors, in place, through a bounded scratch buffer.

    The first copy of each three fills the scratch, so nothing is changed until it is done. Tensors of one pair have
    the same shape, dtype and device.
    """
    pairs: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for left, right in zip(one, other, strict=True):
        assert left.dtype == right.dtype
        assert left.device == right.device
        pairs.setdefault((left.dtype, left.device), []).append((left, right))
    copies: list[Copy] = []
    for (dtype, device), rows in pairs.items():
        elements = min(scratch_elements(device), sum(left.numel() for left, _ in rows))
        for batch in cut(rows, torch.empty(elements, dtype=dtype, device=device)):
            left, right = batch.columns
            copies += [(batch.scratch, left), (left, right), (right, batch.scratch)]
    return copies
