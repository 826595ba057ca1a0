"""What a float32 is short of, as a fraction of its last bit: 2 bytes that make a sum of two numbers.

    number = second * 2 ** -16 * (the worth of the last bit of first)

A sum leaves at most half of its last bit, so 16 bits for that are 2 ** -17 of it at worst, while as many in the form of
bfloat16 are 2 ** -10. Infinities, NaNs and the very largest and smallest numbers have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.int16
_LOWEST, _HIGHEST = -(2.0**-24), 32767 * 2.0**-39


def from_fractions(second: Tensor, first: Tensor) -> Tensor:
    """The second term as float32, exactly.

    Example:
        >>> from_fractions(torch.tensor([1 << 14], dtype=torch.int16), torch.tensor([1.0])).item() == 2.0**-25
        True
    """
    return _power_below(first).mul_(2.0**-39).mul_(second.to(torch.float32))


def to_fractions(number: Tensor, first: Tensor) -> Tensor:
    """The second term of a sum whose first term is given, rounded to nearest, ties to even."""
    # The bits of 2 ** 127 less those of a power of two are those of its inverse.
    inverse = (0x7F000000 - _power_below(first).view(torch.int32)).view(torch.float32)
    part = number * inverse
    part = torch.where(part > _LOWEST, part, _LOWEST).clamp_(max=_HIGHEST)
    return part.mul_(2.0**39).round_().to(DTYPE)


def _power_below(number: Tensor) -> Tensor:
    """The power of two of a float32: its exponent's bits alone."""
    return number.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
