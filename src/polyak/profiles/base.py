"""`Profile`, the function that fixes an average and what follows from it; and checks of numbers that users give."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from numbers import Real
from typing import Any


def check_times(previous: float, now: float) -> None:
    """Raises ValueError unless 0 <= previous <= now < inf.

    Example:
        >>> check_times(7, 5)
        Traceback (most recent call last):
        ValueError: now=5 lies before previous=7: time must not go back; pass the total so far, not what was added
    """
    if 0 <= previous <= now < math.inf:
        return
    if previous > now >= 0:
        raise ValueError(
            f"now={now!r} lies before previous={previous!r}: time must not go back; "
            "pass the total so far, not what was added"
        )
    raise ValueError(
        f"previous={previous!r} and now={now!r} must be finite and at least 0: "
        "pass the steps (or images, or tokens) since the average was made"
    )


def check_now(now: float) -> None:
    """Raises ValueError unless 0 <= now <= inf: ages may also be asked for in the limit."""
    if not now >= 0:
        raise ValueError(f"now={now!r} must be at least 0: pass the time since the average was made, or leave it out")


def check_decay(name: str, value: float) -> float:
    """A decay as a float; raises if it is not a number in [0, 1].

    Example:
        >>> check_decay("decay", -1)
        Traceback (most recent call last):
        ValueError: decay=-1 is outside [0, 1]; it is what the average keeps of itself in one step, for instance 0.999
    """
    check_number(name, value)
    if 0 <= value <= 1:
        return float(value)
    if value > 1:
        hint = f"a length in steps is Exponential(half_life={value!r}), which has its decay as an attribute"
    else:
        hint = "it is what the average keeps of itself in one step, for instance 0.999"
    raise ValueError(f"{name}={value!r} is outside [0, 1]; {hint}")


def check_positive(name: str, value: float) -> float:
    """A finite number above 0 as a float; raises for anything else."""
    check_number(name, value)
    if 0 < value < math.inf:
        return float(value)
    raise ValueError(f"{name}={value!r} must be above 0 and finite")


def check_number(name: str, value: object) -> None:
    """Raises TypeError if it is not a real number, or a bool, which would pass for 0 or 1."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")


LOG_2 = math.log(2)


class Profile(abc.ABC):
    """How the mass g(t) of an average grows with time t.

    The weights of the source at time `now` get the share of the mass that is new since the update before:

        growth(previous, now) = log(g(now) / g(previous))
        weight(previous, now) = 1 - g(previous) / g(now)
        average               = average + weight * (source - average)

    Growth is additive, so updates that were skipped or delayed are made up for exactly by the next one. Time is what
    the caller counts: steps, images or tokens. It is 0 when the average is made, as a copy of the initial weights.

    A subclass gives `growth` and `describe`. Everything else follows from these, and may be overridden by a closed
    form. Profiles are immutable and compare by value.
    """

    @abc.abstractmethod
    def growth(self, previous: float, now: float) -> float:
        """log(g(now) / g(previous)), the growth of the mass between two updates.

        It is at least 0, exactly 0.0 where now == previous, and math.inf where everything before is forgotten.
        A subclass writes it without cancellation, never as a difference of two log g.

        Args:
            previous: time of the update before.
            now: time of this update.

        Raises:
            ValueError: a time is negative or not finite, or `now` lies before `previous`.

        Example:
            >>> import math
            >>> from polyak.profiles import Uniform
            >>> math.exp(Uniform().growth(50, 100))
            2.0
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain data, fit for JSON, that `profile_from_description` turns into an equal profile."""

    def weight(self, previous: float, now: float) -> float:
        """The weight of the source in an update: 1 - g(previous) / g(now), what `torch.lerp` takes.

        Args:
            previous: time of the update before.
            now: time of this update.

        Example:
            >>> from polyak.profiles import Exponential
            >>> Exponential(half_life=10).weight(previous=80, now=100)
            0.75
        """
        return -math.expm1(-self.growth(previous, now))

    def weights(self, times: Iterable[float]) -> list[float]:
        """The share of each time's weights in the average at the last of the times.

        The average is updated at exactly these times. If the first is 0, its share is that of the initial weights.
        Otherwise their share is left out, and the sum is 1 - initial_weight(times[-1]).

        Args:
            times: increasing times, at least one.

        Raises:
            ValueError: there are no times, or they do not increase.

        Example:
            >>> from polyak.profiles import Exponential
            >>> Exponential(0.5).weights([0, 1, 2])
            [0.25, 0.25, 0.5]
        """
        times = list(times)
        if not times:
            raise ValueError("times is empty: pass the times of the updates, the last one being now")
        for previous, now in pairwise(times):
            if previous == now:
                raise ValueError(f"times must increase, but {now!r} is there twice: leave one of the two out")
        growths = [self.growth(previous, now) for previous, now in pairwise(chain([0], times))]
        later = list(running_sums(reversed(growths)))[::-1]
        # What an update gave, times what every later one left of it.
        shares = [
            -math.expm1(-growth) * math.exp(-rest) for growth, rest in zip(growths, [*later[1:], 0.0], strict=True)
        ]
        return shares if times[0] else [math.exp(-later[0]), *shares[1:]]

    def initial_weight(self, now: float) -> float:
        """The share that the initial weights still have at time `now`: g(0) / g(now).

        Example:
            >>> from polyak.profiles import Exponential, Power
            >>> Power().initial_weight(1), Exponential(half_life=1000).initial_weight(2000)
            (0.0, 0.25)
        """
        return math.exp(-self.growth(0, now))

    def learning_rate_decay(self, step: float, now: float) -> float:
        """The factor by which averaging multiplies the update made in a step: 1 - g(step - 1) / g(now).

        Along one trajectory, the average at `now` lies where training would have arrived, had the update of each step
        been multiplied by its factor. Uniform averaging, for instance, is a linear decay of the learning rate.

        Args:
            step: the step of the update, counted from 1.
            now: the step at which the average is taken.

        Raises:
            ValueError: `step` does not lie between 1 and `now`.

        Example:
            >>> from polyak.profiles import Uniform
            >>> [round(Uniform().learning_rate_decay(step, now=4), 12) for step in (1, 2, 3, 4)]
            [1.0, 0.75, 0.5, 0.25]
        """
        if not 1 <= step <= now:
            raise ValueError(f"step={step!r} must lie between 1, the first step, and now={now!r}")
        return self.weight(step - 1, now)

    def mean_age(self, now: float = math.inf) -> float:
        """The mean age of the weights in the average at time `now`; the initial weights have age `now`.

        Without a closed form, the average is taken as updated at every whole step s, and
        mean_age(now) = sum of g(s) / g(now) over 0 <= s < now.

        `Power` and `Uniform` give the limit of many updates, in which time is continuous: now / (exponent + 2).

        Args:
            now: time at which the average is taken, by default the limit of a long run.

        Raises:
            ValueError: `now` is negative, or no whole number where there is no closed form.
        """
        total = 0.0
        for step, growth in self._growth_since(now):
            survival = math.exp(-growth)
            total += survival
            # All that is missing: `step` more terms, none larger than this one.
            if step * survival <= 2**-54 * total:
                break
        return total

    def half_life(self, now: float = math.inf) -> float:
        """The age up to which half the mass of the average at `now` lies: growth(now - age, now) = log(2).

        It is at most `now`, the age of the initial weights, which may hold more than half.

        Args:
            now: time at which the average is taken, by default the limit of a long run.

        Raises:
            ValueError: `now` is negative, or no whole number where there is no closed form.
        """
        later = 0.0
        for step, growth in self._growth_since(now):
            if growth >= LOG_2:
                # Inside a step the growth is taken as even, as it is for a constant decay.
                return now - (step + 1) + (LOG_2 - later) / (growth - later)
            later = growth
        return now

    def _growth_since(self, now: float) -> Iterator[tuple[int, float]]:
        """Yields (step, growth(step, now)) for the whole steps before `now`, from the latest to 0."""
        check_now(now)
        if now == math.inf or now % 1:
            raise ValueError(f"now={now!r} must be a whole number of steps: the ages of {self!r} are summed over them")
        steps = range(int(now), 0, -1)
        for step, growth in zip(steps, running_sums(self._step_growths(steps)), strict=True):
            yield step - 1, growth

    def _step_growths(self, steps: Iterable[int]) -> Iterator[float]:
        """Yields growth(step - 1, step) for each of the steps."""
        for step in steps:
            yield self.growth(step - 1, step)

    def __repr__(self) -> str:
        arguments = [f"{name}={value!r}" for name, value in self.describe().items() if name != "profile"]
        return f"{type(self).__name__}({', '.join(arguments)})"


def running_sums(terms: Iterable[float]) -> Iterator[float]:
    """Yields the running sums of numbers >= 0, compensated (Kahan), so that a million terms lose nothing.

    Example:
        >>> list(running_sums([1.0, 1e-16, 1e-16]))
        [1.0, 1.0, 1.0000000000000002]
    """
    total = lost = 0.0
    for term in terms:
        corrected = term + lost
        before, total = total, total + corrected
        # An infinite sum has lost nothing; inf - inf would make every later sum a NaN.
        lost = corrected - (total - before) if total < math.inf else 0.0
        yield total
