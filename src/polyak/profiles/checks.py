"""What the profiles ask of the numbers they are given; every refusal says what was given and what to do."""

from __future__ import annotations

import math
from numbers import Real


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
