"""Operations that can be interrupted at any point and finished afterwards, and the exchange of two lists by such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import native
from .pieces import copy_, cut, scratch_for

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

    def begin_again(self) -> None:
        """Allows another run from the beginning."""
        for operation in self._operations:
            if isinstance(operation, native.Call):
                operation.begin_again()
        self._num_done = 0

    @torch.no_grad()
    def run(self) -> None:
        """Does the operations that are left."""
        while self._num_done < len(self._operations):
            self._operations[self._num_done]()
            self._num_done += 1


def take_no_memory(operations: Sequence[Operation]) -> bool:
    """Whether keeping these operations costs no memory: those that are not in C hold scratch buffers."""
    return all(isinstance(operation, native.Call) for operation in operations)


def exchange(one: list[Tensor], other: list[Tensor]) -> tuple[list[Operation], list[Operation]]:
    """The operations that exchange the values of corresponding tensors, in place, and those that exchange them back.

    They go through a bounded scratch buffer. Tensors of one pair have the same shape, dtype and device.
    """
    pairs: dict[tuple[torch.dtype, torch.device, bool], list[tuple[Tensor, Tensor]]] = {}
    usable = native.is_usable()
    for left, right in zip(one, other, strict=True):
        assert left.dtype == right.dtype
        assert left.device == right.device
        key = (left.dtype, left.device, usable and native.is_reachable(left, right))
        pairs.setdefault(key, []).append((left, right))
    there: list[Operation] = []
    back: list[Operation] = []
    for (dtype, device, in_c), rows in pairs.items():
        if in_c:
            first, second = native.exchange(rows)
            there.append(first)
            back.append(second)
            continue
        for batch in cut(rows, scratch_for(rows, dtype, device)):
            left, right = batch.columns
            operations = [
                partial(copy_, batch.scratch, left),
                partial(copy_, left, right),
                partial(copy_, right, batch.scratch),
            ]
            there += operations
            back += operations
    return there, back
