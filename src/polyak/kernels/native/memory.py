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
from polyak.kernels.native.compiled import function, library, num_threads
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
    """A call over a table. Those that must not be made twice note by themselves that they were, and then do nothing."""

    def __init__(self, name: str, table: Tensor, num_elements: int, tensors: object) -> None:
        self._call = function(name, *_ARGUMENTS)
        self._table = table
        self._tensors = tensors
        self._done = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._num_elements = num_elements

    def __call__(self) -> None:
        self._call(self._table.data_ptr(), len(self._table), self._done.data_ptr(), num_threads(self._num_elements))


def exchange(rows: Rows) -> Callable[[], None]:
    """What exchanges the values of the two tensors of each row, in place, when it is called for the first time."""
    return _call("exchange", rows, in_bytes=True)


def copy(rows: Rows) -> Callable[[], None]:
    """What copies the second tensor of each row into the first, at each call."""
    return _call("copy", rows, in_bytes=True)


def enter_halves(rows: Rows) -> Callable[[], None]:
    """What puts the float32 average of each row into its bfloat16 source, when it is called for the first time."""
    return _call("enter_halves", rows)


def leave_halves(rows: Rows) -> Callable[[], None]:
    """What undoes `enter_halves`, when it is called for the first time."""
    return _call("leave_halves", rows)


def _call(name: str, rows: Rows, *, in_bytes: bool = False) -> Callable[[], None]:
    chunks = cut_into_chunks(rows)
    counts = chunks.counts
    if in_bytes:
        counts = counts * torch.tensor([one.element_size() for one, _ in rows], device="cpu")[chunks.rows]
    table = torch.cat([chunks.addresses, counts[:, None]], dim=1)
    return _Call(name, table, sum(one.numel() for one, _ in rows), list(rows))


def non_finite(tensors: Sequence[Tensor]) -> Callable[[], list[int]]:
    """What finds the positions of those that hold a NaN or an infinity; all are of one floating-point dtype."""
    look = _Look(f"non_finite_{str(tensors[0].dtype).removeprefix('torch.')}", tensors)

    def find() -> list[int]:
        found = look() != 0
        return sorted({int(row) for row in look.rows[found]}) if bool(found.any()) else []

    return find


def sums(tensors: Sequence[Tensor]) -> list[int]:
    """The sum of each tensor's bits, read as signed integers, modulo 2 ** 64; all of one element size from 2 to 8."""
    look = _Look(f"sum_{8 * tensors[0].element_size()}", tensors)
    return cast(
        "Any", torch.zeros(len(tensors), dtype=torch.int64, device="cpu").index_add_(0, look.rows, look())
    ).tolist()


class _Look:
    """A call over a table that gives a number for each chunk, and the positions of the tensors of the chunks."""

    def __init__(self, name: str, tensors: Sequence[Tensor]) -> None:
        chunks = cut_into_chunks([(tensor,) for tensor in tensors])
        self.rows = chunks.rows
        self._call = function(name, *_ARGUMENTS)
        self._table = torch.cat([chunks.addresses, chunks.counts[:, None]], dim=1)
        self._tensors = list(tensors)
        self._results = torch.empty(len(self._table), dtype=torch.int64, device="cpu")
        self._num_elements = sum(tensor.numel() for tensor in tensors)

    def __call__(self) -> Tensor:
        self._call(self._table.data_ptr(), len(self._table), self._results.data_ptr(), num_threads(self._num_elements))
        return self._results
