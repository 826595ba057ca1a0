"""Tensors that lie in files: what they are and where their bytes are, before anyone has read them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from polyak.errors import FileFormatError
from polyak.files.dtypes import DTYPES

_MAX_DIMENSIONS = 64
_MAX_REPEATED = 1 << 28


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of bytes in a file: where a storage lies, which several tensors may share."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: number `i, j, ...` is element `start + i * stride[0] + j * stride[1] + ...` of the span."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    span: Span

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, when it is by itself."""
        return math.prod(self.shape) * DTYPES[self.dtype].num_bytes


@dataclass(frozen=True, slots=True)
class Pieced:
    """A tensor in several pieces, each with the place of its first element."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], Stored], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, when it is whole."""
        return math.prod(self.shape) * DTYPES[self.dtype].num_bytes


@dataclass(frozen=True, slots=True)
class Between:
    """A tensor that a file gives by two others: `start + weight * (end - start)`."""

    start: Stored
    end: Stored
    weight: float

    @property
    def dtype(self) -> str:
        """That of the two."""
        return self.start.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the two."""
        return self.start.shape

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, when it is computed."""
        return self.start.num_bytes


Leaf: TypeAlias = Stored | Pieced | Between


@dataclass(slots=True, eq=False)
class Record:
    """An object that was pickled and is not made again: its class by name, and the data that was kept with it.

    Attributes:
        of: the class, or the function that would make it.
        arguments: what that would be called with.
        state: its own dictionary, or what it gave in place of it.
        items: what was put into it, where it is a kind of dictionary or, by position, of list.
    """

    of: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict[Any, Any])


@dataclass(frozen=True, slots=True)
class Content:
    """What is in a file or a folder: a tree of dictionaries and lists with tensors in it, none of them read yet."""

    path: Path
    kind: str
    tree: dict[Any, Any]
    about: Mapping[str, Any]
    num_bytes: int


def dense_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of a tensor whose numbers lie in order.

    Example:
        >>> dense_stride((2, 3, 4))
        (12, 4, 1)
    """
    stride, step = [0] * len(shape), 1
    for dimension in reversed(range(len(shape))):
        stride[dimension] = step
        step *= max(shape[dimension], 1)
    return tuple(stride)


def stored(dtype: object, shape: object, stride: object, start: object, span: Span) -> Stored:
    """A tensor as a file describes it, once that is known to lie within its storage and to take no absurd memory.

    Raises:
        FileFormatError: it does not.
    """
    sizes, steps = _counts(shape), _counts(stride)
    right = isinstance(dtype, str) and dtype in DTYPES and type(start) is int and start >= 0
    if not right or sizes is None or steps is None or len(sizes) != len(steps) or len(sizes) > _MAX_DIMENSIONS:
        raise FileFormatError("is damaged: a tensor in it has an impossible form")
    assert isinstance(dtype, str)
    assert isinstance(start, int)
    size = DTYPES[dtype].num_bytes
    if math.prod(sizes):
        last = start + sum((count - 1) * step for count, step in zip(sizes, steps, strict=True))
        if (last + 1) * size > span.num_bytes:
            raise FileFormatError(
                f"is damaged: a tensor in it reaches byte {(last + 1) * size:,} of a storage of {span.num_bytes:,}"
            )
        # A stride of 0 makes a tensor of any size out of one number.
        if math.prod(sizes) * size > max(16 * span.num_bytes, _MAX_REPEATED):
            raise FileFormatError(
                f"is not read: a tensor in it repeats {span.num_bytes:,} bytes to fill {math.prod(sizes) * size:,}"
            )
    elif max(sizes, default=0) > 1 << 62:
        raise FileFormatError("is damaged: a tensor in it has an impossible form")
    return Stored(dtype, sizes, steps, start, span)


def _counts(values: object) -> tuple[int, ...] | None:
    if not isinstance(values, (tuple, list)):
        return None
    found = tuple(cast("list[object]", values))
    right = all(type(value) is int and 0 <= value < 1 << 63 for value in found)
    return cast("tuple[int, ...]", found) if right else None


def leaves_of(leaf: Leaf) -> Iterator[Stored]:
    """The parts of a file that a tensor is made of."""
    for part in parts_of(leaf):
        yield from (part,) if isinstance(part, Stored) else (piece for _, piece in part.pieces)


def parts_of(leaf: Leaf) -> tuple[Stored | Pieced, ...]:
    """The tensors of a file that a tensor is computed from: itself, unless it lies between two."""
    return (leaf.start, leaf.end) if isinstance(leaf, Between) else (leaf,)
