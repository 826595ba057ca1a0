"""How averages are kept: in which dtype, and how they are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.kernels import HALF, Mode, average_dtype, check_floating_point, compensated, dead_zone, plain, stochastic


@dataclass(frozen=True)
class Modes:
    """What the averages of a store are.

    Attributes:
        dtype: of floating-point averages, where it is not that of the source; 16 bits are rounded stochastically.
        compensated: whether a second term holds what averages in float32 are short of.
        seed: of stochastic rounding.
    """

    dtype: torch.dtype | None = None
    compensated: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.compensated, bool):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
            raise TypeError(f"compensated={self.compensated!r}: True or False is needed")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed={self.seed!r}: a whole number from 0 to 2 ** 63 - 1 is needed")
        if self.dtype is None:
            return
        check_floating_point(self.dtype)
        if self.dtype not in (*HALF, torch.float32, torch.float64):
            raise ValueError(
                f"dtype={self.dtype}: averages are kept in torch.float64, torch.float32, torch.bfloat16, torch.float16"
            )
        if self.compensated and self.dtype != torch.float32:
            why = (
                "rounds stochastically, and a second term would take the memory of torch.float32 for less than its "
                "precision"
                if self.dtype in HALF
                else f"has no need of it: its dead zone at decay 0.9999 is {dead_zone(self.dtype, 0.9999):.2g}"
            )
            raise ValueError(
                f"compensated=True, dtype={self.dtype}: leave one of them out; an average in {self.dtype} {why}"
            )

    def average_of(self, source: Tensor, device: torch.device | None) -> Tensor:
        """Memory for the average of a detached source, in its layout."""
        kept = average_dtype(source.dtype) if self.dtype is None else self.dtype
        if source.is_complex() and not kept.is_complex:
            kept = torch.complex128 if kept == torch.float64 else torch.complex64
        return torch.empty_like(source, dtype=kept, device=device)

    @property
    def mode(self) -> Mode:
        """The mode that was asked for."""
        if self.compensated:
            return compensated
        return stochastic if self.dtype in HALF else plain

    def mode_of(self, average: Tensor) -> Mode:
        """The mode of an average: the one that was asked for, unless it does not take this dtype."""
        return self.mode if self.mode.takes(average.dtype) else plain

    @property
    def is_stochastic(self) -> bool:
        """Whether averages are rounded stochastically."""
        return self.mode.draws

    @property
    def configuration(self) -> dict[str, Any]:
        """What a state says of the mode."""
        return self.mode.configuration(seed=self.seed)
