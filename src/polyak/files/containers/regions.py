"""Parts of tensors: which can be read as one stretch of bytes, and how the others are cut until they can."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from polyak.files.dtypes import DTYPES

from .stored import Between, Leaf, Pieced, Stored, parts_of

# In each dimension, where it begins and ends.
Region: TypeAlias = tuple[tuple[int, int], ...]
# That many times the bytes of the wanted numbers may be read, of tensors whose numbers lie apart.
_WASTE = 4


def whole(shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return tuple((0, count) for count in shape)


def sizes(region: Region) -> tuple[int, ...]:
    """How long it is in each dimension.

    Example:
        >>> sizes(((0, 2), (3, 4)))
        (2, 1)
    """
    return tuple(end - begin for begin, end in region)


def covered(stored: Stored, region: Region) -> tuple[int, int]:
    """Where the elements of a region begin in the storage, and how many there are up to its last one."""
    first = stored.start + sum(begin * step for (begin, _), step in zip(region, stored.stride, strict=True))
    return first, 1 + sum((end - begin - 1) * step for (begin, end), step in zip(region, stored.stride, strict=True))


def common(region: Region, offset: Sequence[int], shape: Sequence[int]) -> Region | None:
    """What a region has in common with a piece that begins at an offset; None where there is nothing."""
    shared = tuple(
        (max(begin, at), min(end, at + count)) for (begin, end), at, count in zip(region, offset, shape, strict=True)
    )
    return shared if all(begin < end for begin, end in shared) else None


def cost(leaf: Leaf, region: Region) -> int:
    """The bytes that reading a region takes."""
    return sum(
        (covered(part, region)[1] if isinstance(part, Stored) else math.prod(sizes(region)))
        * DTYPES[part.dtype].num_bytes
        for part in parts_of(leaf)
    )


def item_bytes(leaf: Leaf) -> int:
    """The bytes that one number is read from."""
    return sum(DTYPES[part.dtype].num_bytes for part in parts_of(leaf))


def fits(leaves: Sequence[Leaf], region: Region, most: int) -> bool:
    """Whether a region of tensors of one shape has no more than so many numbers, not too far apart; one alone has."""
    count = math.prod(sizes(region))
    return count <= 1 or (
        count <= most and all(cost(leaf, region) <= _WASTE * most * item_bytes(leaf) for leaf in leaves)
    )


def halves(leaves: Sequence[Leaf], region: Region) -> tuple[Region, Region]:
    """Cuts a region in two, where the numbers of the tensor that takes the most reading lie farthest apart."""
    widest = max(leaves, key=lambda leaf: cost(leaf, region))
    stride = _stride(widest)
    counts = sizes(region)
    if stride is None:
        dimension = next(place for place, count in enumerate(counts) if count > 1)
    else:
        dimension = max(range(len(counts)), key=lambda place: ((counts[place] - 1) * stride[place], counts[place]))
    begin, end = region[dimension]
    middle = (begin + end) // 2
    before, after = region[:dimension], region[dimension + 1 :]
    return (*before, (begin, middle), *after), (*before, (middle, end), *after)


def _stride(leaf: Leaf) -> tuple[int, ...] | None:
    first = parts_of(leaf)[0]
    return first.stride if isinstance(first, Stored) else None


def all_regions(leaves: Sequence[Leaf], most: int) -> Iterator[Region]:
    """Cuts tensors of one shape into regions of no more than so many numbers.

    Example:
        >>> from pathlib import Path
        >>> from polyak.files.containers import Span
        >>> leaf = Stored("float32", (4, 3), (3, 1), 0, Span(Path("x"), 0, 48))
        >>> list(all_regions([leaf], 6))
        [((0, 2), (0, 3)), ((2, 4), (0, 3))]
    """
    if _are_rows(leaves):
        (length,) = leaves[0].shape
        yield from (((begin, min(begin + most, length)),) for begin in range(0, length, most))
        return
    waiting = [whole(leaves[0].shape)] if math.prod(leaves[0].shape) else []
    while waiting:
        region = waiting.pop()
        if fits(leaves, region, most):
            yield region
        else:
            waiting += reversed(halves(leaves, region))


def spread_regions(leaves: Sequence[Leaf], most: int, count: int) -> Iterator[Region]:
    """Some of the regions of no more than so many numbers: evenly spread over the tensors, none of them twice."""
    if _are_rows(leaves):
        (length,) = leaves[0].shape
        for index in range(min(count, length // most)):
            begin = (2 * index + 1) * length // (2 * count) - most // 2
            yield ((begin, begin + most),)
        return
    seen: set[Region] = set()
    for index in range(count if math.prod(leaves[0].shape) else 0):
        place, region = (index + 0.5) / count, whole(leaves[0].shape)
        while not fits(leaves, region, most):
            place *= 2
            region = halves(leaves, region)[int(place)]
            place %= 1
        if region not in seen:
            seen.add(region)
            yield region


def _are_rows(leaves: Sequence[Leaf]) -> bool:
    return all(isinstance(leaf, (Stored, Between)) and _stride(leaf) == (1,) for leaf in leaves)


def flattened(leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """Tensors of one shape as rows of numbers, where they lie without gaps and all in one order; else as they are.

    Example:
        >>> from pathlib import Path
        >>> from polyak.files.containers import Span
        >>> columns = Stored("float32", (4, 3), (1, 4), 0, Span(Path("x"), 0, 48))
        >>> flattened([columns])[0].shape
        (12,)
    """
    parts = [part for leaf in leaves for part in parts_of(leaf)]
    shape = leaves[0].shape
    order: list[int] | None = None
    for part in parts:
        if not isinstance(part, Stored):
            return tuple(leaves)
        stride = part.stride
        if order is None:
            order = sorted((place for place, count in enumerate(shape) if count > 1), key=stride.__getitem__)[::-1]
        step = 1
        for place in reversed(order):
            if stride[place] != step:
                return tuple(leaves)
            step *= shape[place]
    return tuple(_flat(leaf) for leaf in leaves)


def _flat(leaf: Leaf) -> Leaf:
    match leaf:
        case Stored():
            return replace(leaf, shape=(math.prod(leaf.shape),), stride=(1,))
        case Between():
            start, end = (replace(part, shape=(math.prod(part.shape),), stride=(1,)) for part in (leaf.start, leaf.end))
            return Between(start, end, leaf.weight)
        case Pieced():
            return leaf
