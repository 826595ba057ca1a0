"""The uniform profile: the plain mean of all weights so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .base import Profile, check_now, check_times


@dataclass(frozen=True, repr=False)
class Uniform(Profile):
    """The plain mean of all weights so far: stochastic weight averaging, Polyak-Ruppert averaging.

        g(t) = t
        weight(t - 1, t) = 1 / t

    The initial weights are forgotten at the first update. It is `Power(exponent=0)`.

    Example:
        >>> [round(Uniform().weight(step - 1, step), 12) for step in (1, 2, 4)]
        [1.0, 0.5, 0.25]

    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992; Izmailov et al., Averaging
    weights leads to wider optima and better generalization, 2018, algorithm 1.
    """

    def growth(self, previous: float, now: float) -> float:
        """log(now / previous); see `Profile.growth`."""
        check_times(previous, now)
        if previous == now:
            return 0.0
        return math.log1p((now - previous) / previous) if previous else math.inf

    def mean_age(self, now: float = math.inf) -> float:
        """Now / 2; see `Profile.mean_age`."""
        check_now(now)
        return now / 2

    def half_life(self, now: float = math.inf) -> float:
        """Now / 2; see `Profile.half_life`."""
        check_now(now)
        return now / 2

    def describe(self) -> dict[str, Any]:
        """{"profile": "uniform"}."""
        return {"profile": "uniform"}
