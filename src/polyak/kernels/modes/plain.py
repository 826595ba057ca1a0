"""Averages that are rounded to nearest, and nothing beside them.

The arithmetic of every kernel is that of `torch.lerp`: `average + weight * (source - average)` for a weight below one
half, `source - (source - average) * (1 - weight)` from there on. It leaves a finite average that equals its source as
it is, bit for bit but for the sign of a zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mode import Mode, Sources


class _Plain(Mode):
    name = "plain"
    in_c = (torch.float32, torch.float64)
    in_triton = (torch.float32,)

    def takes(self, dtype: torch.dtype) -> bool:
        return True

    def move(self, averages: list[Tensor], beside: list[Tensor], sources: Sources, *, weight: float) -> None:
        del beside
        lerp_(averages, sources.pieces, weight)


def lerp_(averages: list[Tensor], sources: list[Tensor], weight: float) -> None:
    """Moves each average towards its source, in place: `average + weight * (source - average)`.

    A weight of 1 copies, whatever the average holds; a weight of 0 leaves it, whatever the source holds. All tensors
    of one pair have the same dtype and device.
    """
    if not averages or weight == 0.0:
        return
    if weight == 1.0:
        torch._foreach_copy_(averages, sources)
    else:
        torch._foreach_lerp_(averages, sources, weight)


plain = _Plain()
