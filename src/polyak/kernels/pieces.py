"""Cuts lists of tensors into batches of pieces that fit a small scratch buffer.

What needs a temporary (another dtype, another device, an exchange) goes through the scratch batch by batch, so that
the memory beside the averages is bounded, and many small tensors become few calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Elements of scratch: 1 MiB of float32 stays in the cache of a CPU; a GPU wants fewer, larger launches.
_CPU_ELEMENTS = 1 << 18
_GPU_ELEMENTS = 1 << 24
PIECE_ELEMENTS = 1 << 20  # what a temporary in float64 or int64 may take: 8 MiB


@dataclass
class Batch:
    """Corresponding pieces of several lists of tensors, and a scratch piece for each.

    Attributes:
        columns: one list of pieces for each list of tensors that was cut.
        scratch: contiguous pieces of the same shapes, one after another.
        rows: the number of the row that each piece was cut from.
        num_elements: of all pieces of a column.
    """

    columns: list[list[Tensor]]
    scratch: list[Tensor] = field(default_factory=list[Tensor])
    rows: list[int] = field(default_factory=list[int])
    num_elements: int = 0


def scratch_for(rows: Sequence[Sequence[Tensor]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat scratch buffer for rows of tensors: bounded, and no larger than all of them."""
    bound = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
    return torch.empty(min(bound, sum(row[0].numel() for row in rows)), dtype=dtype, device=device)


def cut(rows: Sequence[Sequence[Tensor]], scratch: Tensor) -> list[Batch]:
    """Cuts rows of same-shaped tensors into pieces, and packs these into batches that the scratch can hold.

    Args:
        rows: tensors that belong together, such as a source and its averages; all of one shape.
        scratch: a flat tensor; its batches are used one after another, so all share it.
    """
    batches: list[Batch] = []
    for number, row in enumerate(rows):
        for pieces in _split(tuple(row), scratch.numel()):
            size = pieces[0].numel()
            if not batches or batches[-1].num_elements + size > scratch.numel():
                batches.append(Batch([[] for _ in pieces]))
            batch = batches[-1]
            for column, piece in zip(batch.columns, pieces, strict=True):
                column.append(piece)
            batch.scratch.append(scratch[batch.num_elements :][:size].view(pieces[0].shape))
            batch.rows.append(number)
            batch.num_elements += size
    return batches


def like(pieces: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """Pieces of another flat tensor, at the offsets and in the shapes of the given ones."""
    return [flat[p.storage_offset() : p.storage_offset() + p.numel()].view(p.shape) for p in pieces]


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies each source into its target."""
    if any(map(Tensor.is_conj, targets)) or any(map(Tensor.is_neg, targets)):
        # Grouped operations do not write to conjugate and negative views.
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    elif targets:
        torch._foreach_copy_(targets, sources)


def _split(row: tuple[Tensor, ...], limit: int) -> Iterator[tuple[Tensor, ...]]:
    first = row[0]
    if first.numel() == 0:
        return
    if first.numel() > 1 and first.dim() != 1 and all(_same_dense_layout(first, tensor) for tensor in row):
        row = tuple(tensor.as_strided((tensor.numel(),), (1,)) for tensor in row)
        first = row[0]
    if first.numel() <= limit:
        yield row
    elif first.dim() == 1:
        for start in range(0, first.numel(), limit):
            yield tuple(tensor[start : start + limit] for tensor in row)
    else:
        dim = max(range(first.dim()), key=lambda d: first.shape[d])
        middle = first.shape[dim] // 2
        yield from _split(tuple(tensor.narrow(dim, 0, middle) for tensor in row), limit)
        yield from _split(tuple(tensor.narrow(dim, middle, first.shape[dim] - middle) for tensor in row), limit)


def pieces_of(tensor: Tensor, *, most: int = PIECE_ELEMENTS) -> Iterator[Tensor]:
    """The tensor in pieces of at most `most` elements, for what needs a temporary of another dtype.

    Two tensors of one shape are cut alike.

    Example:
        >>> [tuple(piece.shape) for piece in pieces_of(torch.empty(3, 1 << 20))]
        [(1, 1048576), (1, 1048576), (1, 1048576)]
    """
    if tensor.dim() == 0 or tensor.numel() <= most:
        yield tensor
        return
    row_elements = tensor.numel() // tensor.shape[0]
    if row_elements > most:
        for row in tensor.unbind(0):
            yield from pieces_of(row, most=most)
    else:
        rows = most // row_elements
        for start in range(0, tensor.shape[0], rows):
            yield tensor[start : start + rows]


def stretches_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as flat views of the stretches that it fills; tensors of one layout are cut alike.

    Example:
        >>> [stretch.tolist() for stretch in stretches_of(torch.arange(6).view(2, 3)[:, :2])]
        [[0, 1], [3, 4]]
    """
    if tensor.numel() == 0:
        return
    if is_dense(tensor):
        yield tensor.as_strided((tensor.numel(),), (1,))
        return
    dimension = max(range(tensor.dim()), key=lambda d: tensor.stride(d) * (tensor.shape[d] > 1))
    for row in tensor.unbind(dimension):
        yield from stretches_of(row)


def _same_dense_layout(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() and is_dense(one)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in any order of dimensions.

    Example:
        >>> is_dense(torch.empty(2, 3).t()), is_dense(torch.empty(4, 4)[:, :2]), is_dense(torch.empty(1).expand(3))
        (True, False, False)
    """
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
