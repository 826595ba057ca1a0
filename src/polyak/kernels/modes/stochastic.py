"""Averages of 16 bits, rounded up or down at random and right in the mean; `rounding` says how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.kernels.pieces import copy_, like
from polyak.kernels.precision import HALF
from polyak.kernels.rounding import DRAW, round_stochastically, tensor_key

from .mode import Mode, Sources


class _Stochastic(Mode):
    name = "stochastic"
    in_c = in_triton = (torch.bfloat16, torch.float16)
    draws = True

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype in HALF

    def key(self, name: str) -> int:
        return tensor_key(name)

    def configuration(self, *, seed: int) -> dict[str, Any]:
        return {"seed": seed, "draw": DRAW}

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def move(self, averages: list[Tensor], beside: list[Tensor], sources: Sources, *, weight: float) -> None:
        assert sources.words is not None
        source = sources.flat
        if weight == 1.0:
            # A NaN with bits in its lower half only would be truncated to an infinity.
            high, low = source.masked_fill(source.isnan(), torch.nan), torch.zeros_like(source)
        else:
            average = torch.empty_like(source)
            copy_(like(sources.pieces, average), averages)
            high = torch.lerp(average, source, weight)
            short = float(torch.tensor(weight, dtype=torch.float32))
            base, factor = (average, short) if short < 0.5 else (source, short - 1.0)
            low = (source - average).mul_(factor).sub_(high - base)
        rounded = round_stochastically(high, low, sources.words, averages[0].dtype)
        copy_(averages, like(sources.pieces, rounded))


stochastic = _Stochastic()
