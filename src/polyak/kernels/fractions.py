"""What a float32 is short of, as a fraction of its last bit: 2 bytes that make a sum of two numbers.

    number = second * 2 ** -16 * (the worth of the last bit of first)

A sum leaves at most half of its last bit, so 16 bits for that are 2 ** -17 of it at worst, while as many in the form of
bfloat16 are 2 ** -10. Numbers below 2 ** -87, infinities and NaNs have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.int16
_SMALLEST = 40  # the exponent, as float32 stores it, from which on the scales below are normal numbers
_NOT_FINITE = 255


def from_fractions(second: Tensor, first: Tensor) -> Tensor:
    """The second term as float32, exactly.

    Example:
        >>> from_fractions(torch.tensor([1 << 14], dtype=torch.int16), torch.tensor([1.0])).item() == 2.0**-25
        True
    """
    exponent = _exponent(first)
    scale = torch.where(_is_usable(exponent), exponent - 39, 0).bitwise_left_shift_(23).view(torch.float32)
    return second.to(torch.float32).mul_(scale)


def to_fractions(number: Tensor, first: Tensor) -> Tensor:
    """The second term of a sum whose first term is given, rounded to nearest, ties to even."""
    exponent = _exponent(first)
    usable = _is_usable(exponent)
    scale = torch.where(usable, 293 - exponent, 0).bitwise_left_shift_(23).view(torch.float32)
    units = (number * scale).clamp_(-32768.0, 32767.0).masked_fill_(usable.logical_not_(), 0.0)
    return units.round_().to(DTYPE)


def _exponent(number: Tensor) -> Tensor:
    return number.view(torch.int32).bitwise_right_shift(23).bitwise_and_(0xFF)


def _is_usable(exponent: Tensor) -> Tensor:
    return (exponent >= _SMALLEST).logical_and_(exponent < _NOT_FINITE)
