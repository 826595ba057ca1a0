"""The clock of an average: which call is an update, and what time it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from polyak.errors import StateError
from polyak.profiles import Profile


class Clock(NamedTuple):
    """A moment on the time axis of one average. `make_clock` makes the first one.

    Attributes:
        every: how many calls make one update.
        start: where on the axis time 0 of the profiles is; up to there the average is a copy of the source.
        axis: what time counts, decided by the first call: calls, or what the caller passes as `at`.
        time: the time of the last call.
        num_calls: how often it was called.
    """

    every: int = 1
    start: float = 0.0
    axis: Literal["calls", "at"] | None = None
    time: float = 0.0
    num_calls: int = 0

    def tick(self, at: float | None) -> Clock:
        """The clock after one more call.

        Raises:
            StateError: the time axis is another one than in the calls before.
            ValueError: time does not advance.
        """
        axis = "calls" if at is None else "at"
        if self.axis not in (None, axis):
            raise StateError(
                "update() and update(at=...) cannot be mixed: this average counts "
                f"{'its calls' if self.axis == 'calls' else 'the time that it is given'} since the first update"
            )
        time = self.time + 1.0 if at is None else _number(at)
        if not self.time < time < math.inf:
            raise ValueError(
                f"update(at={at!r}): time must advance, and was {self.time:g} before; give the time after the "
                "optimizer's step, such as the number of images seen so far"
            )
        return Clock(self.every, self.start, axis, time, self.num_calls + 1)

    @property
    def is_due(self) -> bool:
        """Whether the last call makes an update."""
        return self.num_calls % self.every == 0

    @property
    def num_due(self) -> int:
        """How many updates were due."""
        return self.num_calls // self.every

    def growths(self, profiles: Iterable[Profile], *, since: float) -> list[float]:
        """The growth of each profile from an earlier time of this clock to the last call."""
        if self.time <= self.start:
            return [math.inf for _ in profiles]
        previous, now = self.profile_time(since), self.profile_time(self.time)
        return [profile.growth(previous, now) for profile in profiles]

    def profile_time(self, time: float) -> float:
        """A time of this clock as profiles count it."""
        return max(time - self.start, 0.0)


def make_clock(*, every: int, start: float) -> Clock:
    """The clock of an average that was never updated.

    Raises:
        TypeError: the start is not a number.
        ValueError: the start is not finite or negative, or `every` is not a positive integer.
    """
    if type(every) is not int or every < 1:
        raise ValueError(f"every={every!r}: an update is made every 1, 2, 3, ... calls")
    if isinstance(start, bool) or not isinstance(start, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise TypeError(f"start={start!r}: a number is needed, in units of the time axis")
    if not 0 <= start < math.inf:
        raise ValueError(f"start={start!r}: the start is a finite time, 0 or later, in units of the time axis")
    return Clock(every, float(start))


def _number(at: object) -> float:
    try:
        if isinstance(at, (bool, str, bytes)):
            raise TypeError
        return float(at)  # pyright: ignore[reportArgumentType]  # numbers of NumPy and tensors of one element, too
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"update(at={at!r}): a finite number is needed") from error
