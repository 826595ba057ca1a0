"""Passes over memory in C: exchanges, copies, sums of bits, the search for NaNs and infinities."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from polyak.kernels.choice import allowed_kernels
from polyak.kernels.memory import is_plain
from polyak.kernels.pieces import is_dense

from .work import CREW, Work, cut_into_chunks, function, integers, library

Rows = Sequence[tuple[Tensor, Tensor]]
_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def is_usable() -> bool:
    """Whether the library exists and is allowed. Ask once for a list of tensors: the environment is slow to read."""
    return "native" in allowed_kernels() and library() is not None


def is_reachable(tensor: Tensor, *others: Tensor) -> bool:
    """Whether C can take tensors of one shape as stretches of memory, element by element in the same order."""
    return _is_stretch(tensor) and all(_is_stretch(other) and other.stride() == tensor.stride() for other in others)


def _is_stretch(tensor: Tensor) -> bool:
    return tensor.is_cpu and is_plain(tensor) and is_dense(tensor) and not (tensor.is_conj() or tensor.is_neg())


class _Table:
    """Rows of tensors, cut into chunks for the C functions.

    Attributes:
        rows: for each chunk, the number of the row that it is of.
        num_elements: of all rows.
        work: the chunks, for threads to share.
        address: of the table.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]], *, in_bytes: bool = False) -> None:
        chunks = cut_into_chunks(rows)
        counts = chunks.counts
        if in_bytes:
            counts = counts * integers(row[0].element_size() for row in rows)[chunks.rows]
        self.rows = chunks.rows
        self.num_elements = sum(row[0].numel() for row in rows)
        self.work = Work(counts)
        self._columns = torch.cat([chunks.addresses, counts[:, None]], dim=1)
        self._tensors = [tuple(row) for row in rows]  # addresses stay valid as long as these live
        self.address = self._columns.data_ptr()


class Call:
    """A C function over a table of chunks, and its results.

    Functions that must not run twice set their only result when they are done, and then do nothing until `begin_again`.
    The others have a result for each chunk, or none.

    Attributes:
        results: int64.
    """

    def __init__(self, name: str, table: _Table, *, num_results: int = 1) -> None:
        self._function = function(name, *_ARGUMENTS)
        self._table = table
        self.results = torch.zeros(num_results, dtype=torch.int64, device="cpu")

    def __call__(self) -> None:
        """Runs the function."""
        table = self._table
        table.work.num_threads = CREW.size(table.num_elements)
        self._function(ctypes.addressof(table.work), table.address, self.results.data_ptr())

    def begin_again(self) -> None:
        """Allows another run."""
        self.results.zero_()


def exchange(rows: Rows) -> tuple[Call, Call]:
    """Two calls, to be made in turn, each of which exchanges the values of the two tensors of each row, in place."""
    table = _Table(rows, in_bytes=True)
    return Call("exchange", table), Call("exchange", table)


def copy(rows: Rows) -> Call:
    """A call that copies the second tensor of each row into the first, each time that it is made."""
    return Call("copy", _Table(rows, in_bytes=True))


def exchange_halves(rows: Rows) -> tuple[Call, Call]:
    """A call that puts the float32 average of each row into its bfloat16 source, and one that undoes it."""
    table = _Table(rows)
    return Call("enter_halves", table), Call("leave_halves", table)


def non_finite(tensors: Sequence[Tensor]) -> Callable[[], list[int]]:
    """What finds the positions of those that hold a NaN or an infinity; all are of one floating-point dtype."""
    table = _Table([(tensor,) for tensor in tensors])
    call = Call(f"non_finite_{str(tensors[0].dtype).removeprefix('torch.')}", table, num_results=len(table.rows))

    def find() -> list[int]:
        call()
        found = call.results != 0
        return sorted({int(row) for row in table.rows[found]}) if bool(found.any()) else []

    return find


def sums(tensors: Sequence[Tensor]) -> Callable[[], list[int]]:
    """A function that sums the bits of each tensor, read as signed integers, modulo 2 ** 64.

    Args:
        tensors: all of one element size, which is 2, 4 or 8 bytes.
    """
    table = _Table([(tensor,) for tensor in tensors])
    call = Call(f"sum_{8 * tensors[0].element_size()}", table, num_results=len(table.rows))

    def find() -> list[int]:
        call()
        totals = torch.zeros(len(tensors), dtype=torch.int64, device="cpu").index_add_(0, table.rows, call.results)
        return cast("Any", totals).tolist()

    return find
