"""The update in C: every average of many tensors in one call, reading each source once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.kernels.pieces import is_dense
from polyak.kernels.row import Row

from .work import CREW, Work, cut_into_chunks, function, integers

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_supported(row: Row) -> bool:
    """Whether the C kernel can do this row."""
    source, strides = row.source, row.source.stride()
    if source.dtype not in _FLOATS or row.averages[0].dtype not in row.mode.in_c:
        return False
    # Vectors that are dense lie alike.
    return all(
        t.is_cpu and is_dense(t) and not t.is_neg() and (len(strides) <= 1 or t.stride() == strides)
        for t in row.tensors
    )


class _Update(ctypes.Structure):
    """The structure of this name in update.c."""

    _fields_ = (
        ("work", Work), ("table", ctypes.c_void_p), ("num_profiles", ctypes.c_int64), ("weights", ctypes.c_void_p),
        ("step", ctypes.c_uint64), ("nanoseconds", ctypes.c_int64),
    )  # fmt: skip


class Native:
    """A table of chunks in memory, made once; the C function goes through it at each update.

    Args:
        rows: all of the same dtypes and mode. Their tensors must stay where they are.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        source, average = rows[0].source, rows[0].averages[0]
        name = f"{rows[0].mode.name}_{_name(source.dtype)}_{_name(average.dtype)}"
        self._function = function(name, ctypes.c_void_p)
        self._tensors = [row.tensors for row in rows]  # addresses stay valid as long as these live
        self._num_elements = sum(row.source.numel() for row in rows)
        self._table = _table(rows)
        self._weights = (ctypes.c_double * len(rows[0].averages))()
        self._work = Work(self._table[:, 1])
        self._update = _Update(self._work, self._table.data_ptr(), len(self._weights), ctypes.addressof(self._weights))
        self._address = ctypes.addressof(self._update)

    def run(self, weights: Sequence[float], step: int) -> None:
        """Moves the averages of each column towards the sources, with one weight a column."""
        update, threads = self._update, CREW.size(self._num_elements)
        self._weights[:] = weights
        update.step, update.work.num_threads = step, threads
        self._function(self._address)
        if threads > 1:
            CREW.took(update.nanoseconds, self._num_elements)


def _table(rows: Sequence[Row]) -> Tensor:
    chunks = cut_into_chunks([row.tensors for row in rows], [row.first for row in rows])
    firsts = integers(row.first for row in rows)[chunks.rows] + chunks.starts
    # The bits of unsigned numbers, as signed ones.
    keys = integers(row.key - (row.key >> 63 << 64) for row in rows)
    sources, others = chunks.addresses[:, :1], chunks.addresses[:, 1:]
    return torch.cat([sources, torch.stack([chunks.counts, firsts, keys[chunks.rows]], dim=1), others], dim=1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
