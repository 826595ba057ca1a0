"""The power profile: an average whose length is a fixed share of the run so far, however long that is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .base import LOG_2, Profile, check_now, check_number, check_times

# The relative standard deviation of the uniform average, at exponent 0.
LARGEST_RELATIVE_STD = 12**-0.5


@dataclass(frozen=True, init=False, repr=False)
class Power(Profile):
    """An average whose length is a fixed share of the run so far: the power function EMA of EDM2.

        g(t) = t ** (exponent + 1)
        weight(t - 1, t) = 1 - (1 - 1 / t) ** (exponent + 1)
        relative_std ** 2 = (exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))

    Its mean age is 1 / (exponent + 2) of the run so far: 11 % for the default. The initial weights are forgotten at
    the first update. Its length is named in one of two ways, by keyword, since both are small numbers.

    Args:
        relative_std: standard deviation of the times in the average, as a share of the run so far (sigma_rel in the
            paper), in (0, 12 ** -0.5). Default 0.10; 0.05 to 0.15 is usual.
        exponent: exponent (gamma in the paper), above -1. At 0 the average is uniform.

    Attributes:
        relative_std: as given, or of the exponent given.
        exponent: as given, or of the relative_std given.

    Raises:
        ValueError: a value is outside its range, or both are given.
        TypeError: a value is given without a keyword, or is no number.

    Example:
        >>> profile = Power(relative_std=0.05)
        >>> round(profile.exponent, 10)
        16.9721986023
        >>> round(profile.mean_age(1000), 4)
        52.7087
        >>> Power()
        Power(relative_std=0.1)

    Source: Karras et al., Analyzing and improving the training dynamics of diffusion models, 2024, equations 121 to
    127.
    """

    exponent: float
    relative_std: float = field(compare=False)
    _given: tuple[str, float] = field(compare=False)

    def __init__(self, *positional: object, relative_std: float | None = None, exponent: float | None = None) -> None:
        if positional:
            raise TypeError(_which_was_meant(positional))
        if relative_std is not None and exponent is not None:
            raise ValueError(
                f"relative_std={relative_std!r} and exponent={exponent!r} name the same thing twice: give one of them"
            )
        if exponent is not None:
            relative_std = _relative_std_of(exponent)
            given = ("exponent", float(exponent))
        else:
            relative_std = 0.10 if relative_std is None else relative_std
            exponent = _exponent_of(relative_std)
            given = ("relative_std", float(relative_std))
        object.__setattr__(self, "exponent", float(exponent))
        object.__setattr__(self, "relative_std", float(relative_std))
        object.__setattr__(self, "_given", given)

    def growth(self, previous: float, now: float) -> float:
        """(exponent + 1) * log(now / previous); see `Profile.growth`."""
        check_times(previous, now)
        if previous == now:
            return 0.0
        if previous == 0:
            return math.inf
        return (self.exponent + 1) * math.log1p((now - previous) / previous)

    def mean_age(self, now: float = math.inf) -> float:
        """Now / (exponent + 2); see `Profile.mean_age`."""
        check_now(now)
        return now / (self.exponent + 2)

    def half_life(self, now: float = math.inf) -> float:
        """(1 - 2 ** (-1 / (exponent + 1))) * now; see `Profile.half_life`."""
        check_now(now)
        return -math.expm1(-LOG_2 / (self.exponent + 1)) * now

    def describe(self) -> dict[str, Any]:
        """The argument that the profile was made from, for instance {..., "relative_std": 0.1}."""
        name, value = self._given
        return {"profile": "power", name: value}


def _which_was_meant(positional: tuple[object, ...]) -> str:
    value = positional[0]
    if isinstance(value, float) and 0 < value < LARGEST_RELATIVE_STD:
        likely = f"relative_std={value!r} was probably meant, a share of the run"
    else:
        likely = f"exponent={value!r} was probably meant, as a relative_std lies below {LARGEST_RELATIVE_STD:.6f}"
    return f"Power({', '.join(map(repr, positional))}) needs a keyword: {likely}"


def _relative_std_of(exponent: float) -> float:
    check_number("exponent", exponent)
    if not -1 < exponent < math.inf:
        raise ValueError(f"exponent={exponent!r} must be above -1 and finite: the mass of an average must grow")
    exponent = float(exponent)
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def _exponent_of(relative_std: float) -> float:
    """The inverse of `_relative_std_of` on exponents above 0: the one positive root of a cubic."""
    check_number("relative_std", relative_std)
    if not 0 < relative_std < LARGEST_RELATIVE_STD:
        if relative_std > 0:
            hint = f"Uniform() is as wide as can be; an exponent is given as exponent={relative_std!r}"
        else:
            hint = "it is a share of the run, for instance 0.10"
        raise ValueError(f"relative_std={relative_std!r} is outside (0, 12**-0.5 = {LARGEST_RELATIVE_STD:.6f}); {hint}")
    # In x = relative_std * (exponent + 2), which stays between 0.577 and 1, the equation of the class reads
    #     x**3 + relative_std * x**2 - x + relative_std = 0.
    # From above its largest root, where it is convex, Newton's steps only go down, until rounding ends them. They are
    # made of correctly rounded operations alone, so that the exponent is the same on every machine.
    x = 1 / (1 + relative_std)
    while True:
        value = ((x + relative_std) * x - 1) * x + relative_std
        closer = x - value / ((3 * x + 2 * relative_std) * x - 1)
        if closer >= x:
            return x / relative_std - 2
        x = closer
