"""The kernel in C: every average of many tensors in one call, reading each source once."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from polyak.errors import outside
from polyak.kernels.pieces import is_dense

_FUNCTIONS = {
    (torch.float32, torch.float32): "polyak_lerp_float32",
    (torch.float64, torch.float64): "polyak_lerp_float64",
    (torch.bfloat16, torch.float32): "polyak_lerp_bfloat16_float32",
}
# Elements of one row of the table: a chunk of the source stays in the cache while all its averages are updated.
_CHUNK_ELEMENTS = 1 << 14
# A thread more for each of these: waking one costs about as much as that many elements.
_ELEMENTS_PER_THREAD = 1 << 15


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None, with a warning, where the package was installed without one."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                warnings.warn(
                    f"polyak's C kernel cannot be loaded ({error}); torch's own operations do the same, more slowly",
                    stacklevel=outside(),
                )
                return None
    warnings.warn(
        "polyak was installed without its C kernel, because there was no compiler for it; torch's own operations do "
        "the same, more slowly",
        stacklevel=outside(),
    )
    return None


def is_supported(row) -> bool:
    """Whether the C kernel can update this average from this source."""
    source, average = row.source, row.averages[0]
    return row.mode == "plain" and (
        (source.dtype, average.dtype) in _FUNCTIONS
        and source.device.type == average.device.type == "cpu"
        and (source.dim() <= 1 or source.stride() == average.stride())
        and is_dense(source)
        and is_dense(average)
    )


class Native:
    """A table of chunks in memory, made once; the C function goes through it at each update.

    Args:
        rows: a source and its averages each, all of the same dtypes. They must stay where they are.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:
        compiled = library()
        assert compiled is not None
        rows=[row.tensors for row in rows]
        source, *averages = rows[0]
        self._function = compiled[_FUNCTIONS[source.dtype, averages[0].dtype]]
        self._function.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
        self._function.restype = None
        self._sources = [row[0] for row in rows]
        self._averages = [average for row in rows for average in row[1:]]
        self._num_elements = sum(row[0].numel() for row in rows)
        self._table = torch.cat([_chunks(row) for row in rows])
        self._weights = (ctypes.c_double * len(averages))()

    def run(self, weights: Sequence[float], step) -> None:
        """Moves the averages of each column towards the sources, with one weight a column."""
        self._weights[:] = list(weights)
        self._function(
            self._table.data_ptr(),
            len(self._table),
            len(weights),
            ctypes.addressof(self._weights),
            min(torch.get_num_threads(), 1 + self._num_elements // _ELEMENTS_PER_THREAD),
        )
        # So that a graph which was built on an average before, and needs it as it was, raises and does not mislead.
        torch.autograd.graph.increment_version(self._averages)


def _chunks(row: Sequence[Tensor]) -> Tensor:
    """The rows of the table for one source: its address, the number of elements, the addresses of its averages."""
    source, *averages = row
    starts = torch.arange(0, source.numel(), _CHUNK_ELEMENTS)
    counts = (source.numel() - starts).clamp(max=_CHUNK_ELEMENTS)
    addresses = [tensor.data_ptr() + starts * tensor.element_size() for tensor in (source, *averages)]
    return torch.stack([addresses[0], counts, *addresses[1:]], dim=1)
