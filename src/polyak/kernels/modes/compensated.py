"""Averages in float32, and beside each number what it is short of: two bytes that make a sum of two numbers.

    u  = lerp(c, s - a, weight)
    a' = a + u
    c' = (a - a') + u             a + c is the average

`c` is kept as a fraction of the last bit of `a`:

    c = second * 2 ** -16 * (the worth of the last bit of a)

A sum leaves at most half of its last bit, so 16 bits for that are 2 ** -17 of it at worst, while as many in the form of
bfloat16 are 2 ** -10. Infinities, NaNs and the very largest and smallest numbers have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.kernels.pieces import copy_, like

from .mode import Mode, Sources

_LOWEST, _HIGHEST = -(2.0**-24), 32767 * 2.0**-39


class _Compensated(Mode):
    name = "compensated"
    in_c = in_triton = (torch.float32,)

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float32, torch.complex64)

    def beside(self, average: Tensor) -> Tensor:
        """Fractions, of complex numbers as pairs."""
        pairs = torch.view_as_real(average) if average.is_complex() else average
        return torch.zeros_like(pairs, dtype=torch.int16)

    def configuration(self, *, seed: int) -> dict[str, Any]:
        return {"compensated": True}

    def move(self, averages: list[Tensor], beside: list[Tensor], sources: Sources, *, weight: float) -> None:
        if weight == 1.0:
            copy_(averages, sources.pieces)
            torch._foreach_zero_(beside)
            return
        average, second = torch.empty_like(sources.flat), torch.empty_like(sources.flat, dtype=torch.int16)
        copy_(like(sources.pieces, average), averages)
        copy_(like(sources.pieces, second), beside)
        update = from_fractions(second, average).lerp_(sources.flat - average, weight)
        new = average + update
        copy_(averages, like(sources.pieces, new))
        copy_(beside, like(sources.pieces, to_fractions(average.sub_(new).add_(update), new)))


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
    scaled = number * inverse
    scaled = torch.where(scaled > _LOWEST, scaled, _LOWEST).clamp_(max=_HIGHEST)
    return scaled.mul_(2.0**39).round_().to(torch.int16)


def _power_below(number: Tensor) -> Tensor:
    """The power of two of a float32: its exponent's bits alone."""
    return number.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)


compensated = _Compensated()
