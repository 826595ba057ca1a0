"""The exchange of a bfloat16 source with a float32 average, in place, with no memory beside a scratch buffer.

The source gets the upper half of the average, rounded to nearest, ties up. What that leaves of the average is a signed
difference of 16 bits, and it shares the average's 32 bits with the source's own value:

    average    aaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb        source   ssssssssssssssss
    upper      average >> 16, plus 1 where the lower half is 2 ** 15 or more
    rest       average - (upper << 16), from -2 ** 15 to 2 ** 15 - 1
    inside     ssssssssssssssss rrrrrrrrrrrrrrrr        source   upper

A NaN is cut and not rounded, for a carry could make it finite, and its rest has no sign. One whose upper half would be
that of an infinity is made quiet: it stays a NaN in the source, and comes back as a quiet one.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import native
from .journal import Operation
from .pieces import Batch, copy_, cut, like, scratch_for

_EXPONENT = 0x7F800000
_LOWER = 0xFFFF
_INFINITY = 0x7F80  # of bfloat16, without the sign
_QUIET = 0x40


def exchange_halves(sources: list[Tensor], averages: list[Tensor]) -> tuple[list[Operation], list[Operation]]:
    """The operations that put float32 averages into bfloat16 sources, and those that put everything back.

    Args:
        sources: tensors of bfloat16.
        averages: tensors of float32, on the same device.
    """
    devices: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    in_c: list[tuple[Tensor, Tensor]] = []
    usable = native.is_usable()
    for source, average in zip(sources, averages, strict=True):
        if usable and native.is_reachable(source, average):
            in_c.append((source, average))
        else:
            devices.setdefault(source.device, []).append((average.view(torch.int32), source.view(torch.int16)))
    enter: list[Operation] = []
    leave: list[Operation] = []
    if in_c:
        there, back = native.exchange_halves(in_c)
        enter, leave = [there], [back]
    for device, rows in devices.items():
        words = scratch_for(rows, torch.int32, device)
        shorts = torch.empty_like(words)
        for batch in cut(rows, words):
            fill = partial(_fill, batch, like(batch.scratch, shorts))
            enter += [fill, partial(_enter, batch, words, shorts)]
            leave += [fill, partial(_leave, batch, words, shorts)]
    return enter, leave


def upper_half(average: Tensor) -> Tensor:
    """A float32 tensor in bfloat16 as the swap rounds it: to nearest, ties up; a NaN stays one.

    Example:
        >>> upper_half(torch.tensor([1.0, 1.00390625, 1.01171875]))
        tensor([1.0000, 1.0078, 1.0156], dtype=torch.bfloat16)
    """
    return _upper(average.view(torch.int32)).to(torch.int16).view(torch.bfloat16)


def average_inside(source: Tensor, slot: Tensor) -> Tensor:
    """The average while its upper half stands in the source."""
    return _joined(slot.view(torch.int32), source.view(torch.int16).to(torch.int32)).view(torch.float32)


def raw_inside(slot: Tensor) -> Tensor:
    """The source's own value while the average's upper half stands in the source."""
    return slot.view(torch.int32).bitwise_right_shift(16).to(torch.int16).view(torch.bfloat16)


def _fill(batch: Batch, shorts: list[Tensor]) -> None:
    averages, sources = batch.columns
    copy_(batch.scratch, averages)
    copy_(shorts, sources)


def _enter(batch: Batch, words: Tensor, shorts: Tensor) -> None:
    upper = _upper(words)
    rest = (words - upper.bitwise_left_shift(16)).bitwise_and_(_LOWER)
    _write(batch, shorts.bitwise_left_shift(16).bitwise_or_(rest), upper)


def _leave(batch: Batch, words: Tensor, shorts: Tensor) -> None:
    _write(batch, _joined(words, shorts), words.bitwise_right_shift(16))


def _write(batch: Batch, words: Tensor, shorts: Tensor) -> None:
    averages, sources = batch.columns
    copy_(averages, like(batch.scratch, words))
    copy_(sources, like(batch.scratch, shorts))


def _upper(words: Tensor) -> Tensor:
    special = words.bitwise_and(_EXPONENT) == _EXPONENT
    upper = special.logical_not().to(torch.int32).mul_(1 << 15).add_(words).bitwise_right_shift_(16)
    hidden = special.logical_and_(upper.bitwise_and(0x7FFF) == _INFINITY).logical_and_(words.bitwise_and(_LOWER) != 0)
    return upper.bitwise_or_(hidden.to(torch.int32).mul_(_QUIET))


def _joined(words: Tensor, shorts: Tensor) -> Tensor:
    # Shifted up and down again, the lower half gets its sign.
    rest = words.bitwise_left_shift(16).bitwise_right_shift_(16)
    unsigned = shorts.bitwise_and(0x7FFF) > _INFINITY
    rest = torch.where(unsigned, rest.bitwise_and(_LOWER), rest)
    return rest.add_(shorts.bitwise_left_shift(16))
