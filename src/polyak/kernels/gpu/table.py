"""The table that a Triton kernel goes through: rows and their chunks in device memory, as `encoding` says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.kernels.pieces import is_dense
from polyak.kernels.row import Row

from .encoding import CHUNK_COLUMNS, COUNT_SHIFT, FORMATS, KIND_SHIFT, PACKED, VECTOR_SIZE, kind_of, signed

# Elements that a program takes at once: 8 for each of 128 threads, and one program for a 32x32 tensor.
BLOCK = 1024
# A chunk is so many blocks at most. Looking up a row and mixing its key cost a thread some 60 operations, which 64
# elements share; and 7e9 elements make 14 MB of chunks.
_MAX_BLOCKS = 8
# Fewer blocks a chunk where there would be fewer programs than this: about four times what 132 multiprocessors hold.
_PROGRAMS = 8192


@dataclass(frozen=True)
class Table:
    """What a kernel reads.

    Attributes:
        rows: int64, on the device.
        chunks: int64, on the device.
        kinds: those of the chunks, each once, in order.
        num_profiles: averages of each row.
        block: elements that a program takes at once.
    """

    rows: Tensor
    chunks: Tensor
    kinds: tuple[int, ...]
    num_profiles: int
    block: int


def fits(row: Row) -> bool:
    """Whether the kernel can update these averages from this source, given that it can run on their device."""
    return (
        row.source.dtype in FORMATS
        and row.averages[0].dtype in row.mode.in_triton
        and all(is_dense(tensor) and not tensor.is_neg() for tensor in row.tensors)
        and all(tensor.device == row.source.device for tensor in row.tensors)
        and all(strides(tensor) == strides(row.source) for tensor in row.tensors)
    )


def make_table(rows: Sequence[Row]) -> Table:
    """The table of rows that fit, all on one device and with as many averages each."""
    total = sum(row.source.numel() for row in rows)
    blocks = min(max(total // (_PROGRAMS * BLOCK), 1), _MAX_BLOCKS)
    chunks = make_chunks(rows, blocks * BLOCK)
    device = rows[0].source.device
    return Table(
        rows=torch.tensor([_record(row) for row in rows], dtype=torch.int64).to(device),
        chunks=chunks.to(device),
        kinds=tuple(int(kind) for kind in torch.bincount(chunks[:, PACKED] >> KIND_SHIFT).nonzero()),
        num_profiles=len(rows[0].averages),
        block=BLOCK,
    )


def make_chunks(rows: Sequence[Row], elements: int) -> Tensor:
    """The chunks of all rows, on the CPU, of so many elements at most."""
    chunks = [chunk for number, row in enumerate(rows) for chunk in _chunks(number, row, elements)]
    return torch.cat(chunks) if chunks else torch.empty(0, CHUNK_COLUMNS, dtype=torch.int64, device="cpu")


def strides(tensor: Tensor) -> list[int]:
    """The strides that matter."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _record(row: Row) -> list[int]:
    averages = [average.data_ptr() for average in row.averages]
    beside = [tensor.data_ptr() for tensor in row.beside] or [0] * len(averages)
    return [row.source.data_ptr(), signed(row.key), row.first, *averages, *beside]


def _chunks(number: int, row: Row, elements: int) -> Iterator[Tensor]:
    """The chunks of one row: those that vectors can read, and what is left over or not aligned."""
    for start, stop in _segments(row):
        sizes = [(tensor.data_ptr(), tensor.element_size()) for tensor in row.tensors]
        aligned = all((address + start * size) % (VECTOR_SIZE * size) == 0 for address, size in sizes)
        # Vectors hold whole pairs of neighbours, which share their random bits.
        aligned = aligned and (not row.mode.draws or (row.first + start) % 2 == 0)
        # A small tensor of an odd size is one chunk, not two.
        whole = stop - start >= BLOCK or (stop - start) % VECTOR_SIZE == 0
        middle = start + (stop - start) // VECTOR_SIZE * VECTOR_SIZE if aligned and whole else start
        for first, last, is_vector in ((start, middle, True), (middle, stop, False)):
            starts = torch.arange(first, last, elements, device="cpu")
            counts = (last - starts).clamp(max=elements)
            kind = kind_of(row.mode, source=row.source.dtype, average=row.averages[0].dtype, is_vector=is_vector)
            yield torch.stack([starts, number | counts << COUNT_SHIFT | kind << KIND_SHIFT], dim=1)


def _segments(row: Row) -> Iterator[tuple[int, int]]:
    """The row, cut wherever a segment ends: wherever the upper 32 bits of a pair's number change, and so the key."""
    start, size = 0, row.source.numel()
    while start < size:
        stop = min(size, (((row.first + start >> 33) + 1) << 33) - row.first)
        yield start, stop
        start = stop
