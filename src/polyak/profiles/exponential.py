"""The exponential profile: the classic moving average, whose length is a fixed number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .base import LOG_2, Profile, check_decay, check_now, check_positive, check_times


@dataclass(frozen=True, init=False, repr=False)
class Exponential(Profile):
    """The classic exponential moving average, whose length is a fixed number of steps.

        g(t) = decay ** -t                    the initial weights keep the share decay ** t
        g(t) = decay ** -t - 1                with `debias`: they are forgotten at the first update
        weight(t - 1, t) = 1 - decay          without `debias`, at every update

    Its length is named in one of three ways, in units of the time axis (steps, unless times are passed):

        decay = 2 ** (-1 / half_life) = mean_age / (1 + mean_age)

    Args:
        decay: what the average keeps of itself in one unit of time, in [0, 1]; may be given without keyword.
        half_life: time in which a share halves.
        mean_age: mean age of the weights in the average of a long run.
        debias: whether to weigh as if the average had begun with no mass, as Adam corrects its moments.

    Attributes:
        rate: -log(decay), the growth in one unit of time without `debias`.
        debias: as given.

    Raises:
        ValueError: not exactly one length is given, or it is outside its range.
        TypeError: a length is no number.

    Example:
        >>> profile = Exponential(half_life=1000)
        >>> round(profile.decay, 10), round(profile.mean_age(), 4)
        (0.999307093, 1442.1951)
        >>> round(profile.initial_weight(3000), 12)
        0.125
        >>> Exponential(0.9, debias=True).initial_weight(1)
        0.0

    Source: Kingma and Ba, Adam: a method for stochastic optimization, 2015, section 3, for `debias`.
    """

    rate: float
    debias: bool
    _given: tuple[str, float] = field(compare=False)

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life: float | None = None,
        mean_age: float | None = None,
        debias: bool = False,
    ) -> None:
        lengths = {"decay": decay, "half_life": half_life, "mean_age": mean_age}
        given = [(name, value) for name, value in lengths.items() if value is not None]
        if len(given) != 1:
            listed = " and ".join(f"{name}={value!r}" for name, value in given) or "none"
            raise ValueError(f"give exactly one of decay=, half_life= and mean_age=; got {listed}")
        [(name, value)] = given
        value = check_decay(name, value) if name == "decay" else check_positive(name, value)
        rate = _RATES[name](value)
        if debias and rate == 0:
            raise ValueError(f"{name}={value!r} with debias=True would weigh all updates alike: use Uniform()")
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "debias", bool(debias))
        object.__setattr__(self, "_given", (name, value))

    @property
    def decay(self) -> float:
        """What the average keeps of itself in one unit of time: exp(-rate)."""
        name, value = self._given
        return value if name == "decay" else math.exp(-self.rate)

    def growth(self, previous: float, now: float) -> float:
        """(now - previous) * rate, and with `debias` the log of a ratio of expm1; see `Profile.growth`."""
        check_times(previous, now)
        if previous == now:
            return 0.0
        growth = (now - previous) * self.rate
        if not self.debias:
            return growth
        if previous == 0:
            return math.inf
        # log(expm1(now * rate) / expm1(previous * rate)), taken apart so that nothing cancels and nothing overflows.
        before = previous * self.rate
        return growth + math.log1p(math.exp(-before) * math.expm1(-growth) / math.expm1(-before))

    def mean_age(self, now: float = math.inf) -> float:
        """The mean age of an average that is updated at every unit of time; see `Profile.mean_age`.

        decay / (1 - decay) in the limit. At time `now` it is (1 - decay ** now) times that, and with `debias` it is
        less by now / (decay ** -now - 1).
        """
        check_now(now)
        if self.rate == 0:
            return now
        if not self.debias:
            return self.decay * math.expm1(-now * self.rate) / math.expm1(-self.rate) if now else 0.0
        if now <= 1:
            return 0.0
        passed = now * self.rate
        if passed < 1:
            # The two terms nearly cancel: 1 / expm1(x) = 1 / x - 1 / 2 + langevin(x / 2) / 2 takes 1 / x out.
            return (now - 1 - now * _langevin(passed / 2) + _langevin(self.rate / 2)) / 2
        limit = -self.decay / math.expm1(-self.rate)
        return limit + now * math.exp(-passed) / math.expm1(-passed) if passed < math.inf else limit

    def half_life(self, now: float = math.inf) -> float:
        """log(2) / rate, at most `now`; with `debias` less by log1p(exp(-now * rate)) / rate.

        See `Profile.half_life`.
        """
        check_now(now)
        if now == 0 or self.rate in (0, math.inf):
            return 0.0 if self.rate else now
        if self.debias:
            return -math.log1p(math.expm1(-now * self.rate) / 2) / self.rate
        return min(now, LOG_2 / self.rate)

    def describe(self) -> dict[str, Any]:
        """The argument that the profile was made from, for instance {..., "half_life": 1000.0}."""
        name, value = self._given
        description: dict[str, Any] = {"profile": "exponential", name: value}
        return description | {"debias": True} if self.debias else description


def _rate_of_decay(decay: float) -> float:
    return abs(math.log(decay)) if decay else math.inf


def _rate_of_half_life(half_life: float) -> float:
    return LOG_2 / half_life


def _rate_of_mean_age(mean_age: float) -> float:
    return math.log1p(1 / mean_age)


# The rate -log(decay) straight from what was given: a decay near 1 would have rounded most digits of a length away.
_RATES = {"decay": _rate_of_decay, "half_life": _rate_of_half_life, "mean_age": _rate_of_mean_age}


def _langevin(x: float) -> float:
    """coth(x) - 1 / x for 0 <= x < 1 by its continued fraction x / (3 + x**2 / (5 + x**2 / (7 + ...)))."""
    denominator = 19.0
    for odd in range(17, 1, -2):
        denominator = odd + x * x / denominator
    return x / denominator
