"""Whether an average stood in the model when both were saved."""

from __future__ import annotations

from collections.abc import Iterable

from polyak.files.containers import ITEM_SIZES, Leaf, Stored

_CHUNK = 1 << 20


def stands_in(average: Iterable[Leaf], weights: Iterable[Leaf]) -> bool:
    """Whether all tensors of an average are among the weights, bit for bit and in the same order.

    Reads until one is not, which in a model that was trained since is the first.
    """
    rest = iter(weights)
    return all(any(_is_same(one, other) for other in rest) for one in average)


def _is_same(one: Leaf, other: Leaf) -> bool:
    if not (isinstance(one, Stored) and isinstance(other, Stored)):
        return False
    if (one.dtype, one.shape, one.stride) != (other.dtype, other.shape, other.stride):
        return False
    size = ITEM_SIZES[one.dtype]
    last = sum((count - 1) * step for count, step in zip(one.shape, one.stride, strict=True))
    left = (1 + last) * size if one.num_bytes else 0
    with one.span.path.open("rb") as first, other.span.path.open("rb") as second:
        first.seek(one.span.offset + one.start * size)
        second.seek(other.span.offset + other.start * size)
        while left > 0:
            count = min(left, _CHUNK)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True
