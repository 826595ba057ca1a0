"""Conversions between numbers by which people name lengths of averages, where no profile has them as an attribute."""

from __future__ import annotations

import math

from .base import check_decay, check_positive


def mean_age_to_exponent(mean_age: float, duration: float) -> float:
    """The exponent of the power profile that has a given mean age at the end of a run.

    Args:
        mean_age: mean age at the end, above 0 and below `duration`; half of it is the uniform average.
        duration: length of the run, in the same unit.

    Raises:
        ValueError: `mean_age` does not lie between 0 and `duration`.

    Example:
        >>> mean_age_to_exponent(10_000, 100_000)
        8.0
    """
    mean_age, duration = check_positive("mean_age", mean_age), check_positive("duration", duration)
    if mean_age >= duration:
        raise ValueError(f"mean_age={mean_age!r} must be below duration={duration!r}: nothing is older than the run")
    return (duration - 2 * mean_age) / mean_age


def decay_to_relative_std(decay: float, duration: float) -> float:
    """The standard deviation of the ages under a constant decay, as a share of a run.

        relative_std = sqrt(decay) / ((1 - decay) * duration)

    A power profile of this relative_std is as wide at the end of the run. Where the result is not below 12 ** -0.5,
    the run is too short for the decay: no power profile is as wide.

    Args:
        decay: decay per step, in [0, 1].
        duration: length of the run in steps.

    Raises:
        ValueError: `decay` is outside [0, 1], or `duration` not above 0.

    Example:
        >>> round(decay_to_relative_std(0.9999, 100_000), 6)
        0.099995
    """
    decay, duration = check_decay("decay", decay), check_positive("duration", duration)
    return math.sqrt(decay) / ((1 - decay) * duration) if decay < 1 else math.inf


def relative_std_to_decay(relative_std: float, duration: float) -> float:
    """The constant decay whose ages have a standard deviation that is a given share of a run.

    The inverse of `decay_to_relative_std`.

    Args:
        relative_std: standard deviation of the ages as a share of the run, above 0.
        duration: length of the run in steps.

    Raises:
        ValueError: one of them is not above 0.

    Example:
        >>> round(relative_std_to_decay(0.10, 100_000), 6)
        0.9999
    """
    std = check_positive("relative_std", relative_std) * check_positive("duration", duration)
    # The root of std * (1 - x**2) = x for x = sqrt(decay), written without a difference.
    return (2 * std / (1 + math.sqrt(1 + 4 * std * std))) ** 2


def scale_decay(decay: float, kappa: float) -> float:
    """The decay for a batch that is `kappa` times as large: decay ** kappa.

    The half-life then stays the same number of samples. 1 - kappa * (1 - decay) is only close to it.

    Args:
        decay: decay per step at the batch size that it was chosen for, in [0, 1].
        kappa: new batch size over the old one, above 0.

    Raises:
        ValueError: `decay` is outside [0, 1], or `kappa` not above 0.

    Example:
        >>> round(scale_decay(0.9999, 8), 8)
        0.99920028

    Source: Busbridge et al., How to scale your EMA, 2023, the EMA scaling rule.
    """
    return check_decay("decay", decay) ** check_positive("kappa", kappa)
