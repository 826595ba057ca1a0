"""Operations that can be interrupted at any point and finished afterwards, and the exchange of two lists by such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from polyak.kernels import native
from polyak.kernels.eager import copy_
from polyak.kernels.pieces import cut, scratch_for

Operation = Callable[[], None]


class Journal:
    """A sequence of operations, and how many of them are done.

    Each may be repeated as long as the next has not begun, so whoever is interrupted in `run` (Ctrl-C included) calls
    it again, and it goes on where it was: no value is lost.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = list(operations)
        self._num_done = 0

    @property
    def started(self) -> bool:
        """Whether more than the first operation may have begun; that one must change nothing but scratch memory."""
        return self._num_done > 0

    @torch.no_grad()
    def run(self) -> None:
        """Does the operations that are left."""
        while self._num_done < len(self._operations):
            self._operations[self._num_done]()
            self._num_done += 1


def exchange(one: list[Tensor], other: list[Tensor]) -> list[Operation]:
    """The operations that exchange the values of corresponding tensors, in place, through a bounded scratch buffer.

    They can be run once. Tensors of one pair have the same shape, dtype and device.
    """
    pairs: dict[tuple[torch.dtype, torch.device, bool], list[tuple[Tensor, Tensor]]] = {}
    for left, right in zip(one, other, strict=True):
        assert left.dtype == right.dtype
        assert left.device == right.device
        key = (left.dtype, left.device, native.is_reachable(left, right))
        pairs.setdefault(key, []).append((left, right))
    operations: list[Operation] = []
    for (dtype, device, in_c), rows in pairs.items():
        if in_c:
            operations += [native.exchange(rows)]
            continue
        for batch in cut(rows, scratch_for(rows, dtype, device)):
            left, right = batch.columns
            operations += [
                partial(copy_, batch.scratch, left),
                partial(copy_, left, right),
                partial(copy_, right, batch.scratch),
            ]
    return operations
