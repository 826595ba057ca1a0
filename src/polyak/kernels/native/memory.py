"""Exchanges, sums of bits and a look for infinities and NaNs in C; each where the library is there and fits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from polyak.kernels.choice import allowed_kernels
from polyak.kernels.memory import is_plain
from polyak.kernels.native.chunks import cut_into_chunks
from polyak.kernels.native.compiled import function, library
from polyak.kernels.native.crew import CREW
from polyak.kernels.pieces import is_dense

Rows = Sequence[tuple[Tensor, Tensor]]
_ARGUMENTS = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)


def is_reachable(*tensors: Tensor) -> bool:
    """Whether C can take tensors of one shape as stretches of memory, element by element in the same order."""
    return (
        all(is_plain(t) and t.device.type == "cpu" and is_dense(t) for t in tensors)
        and not any(t.is_conj() or t.is_neg() for t in tensors)
        and all(t.stride() == tensors[0].stride() for t in tensors)
        and "native" in allowed_kernels()
        and library() is not None
    )


class _Call:
    """A call over a table of chunks, and what it gives.

    What must not be done twice notes in its only result, by itself, that it was done, and then does nothing; others
    have a result for each chunk, or none.

    Attributes:
        rows: for each chunk, the number of the row that it is of.
        results: int64.
    """

    def __init__(
        self, name: str, rows: Sequence[Sequence[Tensor]], *, in_bytes: bool = False, num_results: int | None = None
    ) -> None:
        chunks = cut_into_chunks(rows)
        counts = chunks.counts
        if in_bytes:
            counts = counts * torch.tensor([row[0].element_size() for row in rows], device="cpu")[chunks.rows]
        self.rows = chunks.rows
        self.results = torch.zeros(num_results or len(counts), dtype=torch.int64, device="cpu")
        self._function = function(name, *_ARGUMENTS)
        self._table = torch.cat([chunks.addresses, counts[:, None]], dim=1)
        self._tensors = [tuple(row) for row in rows]  # addresses stay valid as long as these live
        self._num_elements = sum(row[0].numel() for row in rows)

    def __call__(self) -> None:
        threads = CREW.size(self._num_elements)
        self._function(self._table.data_ptr(), len(self._table), self.results.data_ptr(), threads)


def exchange(rows: Rows) -> Callable[[], None]:
    """What exchanges the values of the two tensors of each row, in place, when it is called for the first time."""
    return _Call("exchange", rows, in_bytes=True, num_results=1)


def copy(rows: Rows) -> Callable[[], None]:
    """What copies the second tensor of each row into the first, at each call."""
    return _Call("copy", rows, in_bytes=True, num_results=1)


def enter_halves(rows: Rows) -> Callable[[], None]:
    """What puts the float32 average of each row into its bfloat16 source, when it is called for the first time."""
    return _Call("enter_halves", rows, num_results=1)


def leave_halves(rows: Rows) -> Callable[[], None]:
    """What undoes `enter_halves`, when it is called for the first time."""
    return _Call("leave_halves", rows, num_results=1)


def non_finite(tensors: Sequence[Tensor]) -> Callable[[], list[int]]:
    """What finds the positions of those that hold a NaN or an infinity; all are of one floating-point dtype."""
    look = _Call(f"non_finite_{str(tensors[0].dtype).removeprefix('torch.')}", [(tensor,) for tensor in tensors])

    def find() -> list[int]:
        look()
        found = look.results != 0
        return sorted({int(row) for row in look.rows[found]}) if bool(found.any()) else []

    return find


def sums(tensors: Sequence[Tensor]) -> list[int]:
    """The sum of each tensor's bits, read as signed integers, modulo 2 ** 64; all of one element size from 2 to 8."""
    look = _Call(f"sum_{8 * tensors[0].element_size()}", [(tensor,) for tensor in tensors])
    look()
    totals = torch.zeros(len(tensors), dtype=torch.int64, device="cpu").index_add_(0, look.rows, look.results)
    return cast("Any", totals).tolist()
