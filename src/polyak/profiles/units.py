"""Conversions between the numbers by which people name the length of an average."""

from __future__ import annotations

import math

from .checks import check_decay, check_number, check_positive

# The relative standard deviation of the uniform average, at exponent 0.
LARGEST_RELATIVE_STD = 12**-0.5


def decay_to_half_life(decay: float) -> float:
    """Returns the number of steps in which a share halves: log(1 / 2) / log(decay).

    Args:
        decay: Decay per step, in [0, 1].

    Raises:
        ValueError: `decay` is outside [0, 1].

    Example:
        >>> round(decay_to_half_life(0.9999), 1)
        6931.1
    """
    decay = check_decay("decay", decay)
    if decay == 1:
        return math.inf
    return -math.log(2) / math.log(decay) if decay else 0.0


def half_life_to_decay(half_life: float) -> float:
    """Returns the decay per step that halves a share in `half_life` steps: 2 ** (-1 / half_life).

    Args:
        half_life: Number of steps, above 0.

    Raises:
        ValueError: `half_life` is not above 0 and finite.

    Example:
        >>> round(half_life_to_decay(693), 6)
        0.999
    """
    return 2 ** (-1 / check_positive("half_life", half_life))


def decay_to_mean_age(decay: float) -> float:
    """Returns the mean age in steps of an average with a constant decay: decay / (1 - decay).

    Args:
        decay: Decay per step, in [0, 1].

    Raises:
        ValueError: `decay` is outside [0, 1].

    Example:
        >>> round(decay_to_mean_age(0.999), 6)
        999.0
    """
    decay = check_decay("decay", decay)
    return decay / (1 - decay) if decay < 1 else math.inf


def mean_age_to_decay(mean_age: float) -> float:
    """Returns the decay per step of the average that is `mean_age` steps old: mean_age / (1 + mean_age).

    Args:
        mean_age: Number of steps, above 0.

    Raises:
        ValueError: `mean_age` is not above 0 and finite.

    Example:
        >>> mean_age_to_decay(999)
        0.999
    """
    mean_age = check_positive("mean_age", mean_age)
    return mean_age / (1 + mean_age)


def exponent_to_relative_std(exponent: float) -> float:
    """Returns the relative standard deviation of a power profile.

        relative_std ** 2 = (exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))

    Args:
        exponent: Exponent of the profile, above -1.

    Raises:
        ValueError: `exponent` is not above -1 and finite.

    Example:
        >>> exponent_to_relative_std(0) == 12**-0.5
        True

    Source:
        Karras et al., Analyzing and improving the training dynamics of diffusion models, 2024, equations 122 to 126.
    """
    exponent = _check_exponent(exponent)
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def relative_std_to_exponent(relative_std: float) -> float:
    """Returns the exponent of the power profile with a relative standard deviation.

    The inverse of `exponent_to_relative_std` on exponents above 0: the one positive root of a cubic.

    Args:
        relative_std: Standard deviation as a share of the run, in (0, 12 ** -0.5).

    Raises:
        ValueError: `relative_std` is outside its range.

    Example:
        >>> round(relative_std_to_exponent(0.10), 10)
        6.9372039376

    Source:
        Karras et al., Analyzing and improving the training dynamics of diffusion models, 2024, equations 122 to 126.
    """
    check_number("relative_std", relative_std)
    if not 0 < relative_std < LARGEST_RELATIVE_STD:
        if relative_std > 0:
            hint = f"Uniform() is as wide as can be; an exponent is given as exponent={relative_std!r}"
        else:
            hint = "it is a share of the run, for instance 0.10"
        raise ValueError(f"relative_std={relative_std!r} is outside (0, 12**-0.5 = {LARGEST_RELATIVE_STD:.6f}); {hint}")
    # In x = relative_std * (exponent + 2), which stays between 0.577 and 1, the equation above reads
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


def exponent_to_mean_age(exponent: float, duration: float) -> float:
    """Returns the mean age of a power profile at the end of a run: duration / (exponent + 2).

    Args:
        exponent: Exponent of the profile, above -1.
        duration: Length of the run, in any unit of time.

    Raises:
        ValueError: `exponent` is not above -1, or `duration` not above 0.

    Example:
        >>> exponent_to_mean_age(8, 100_000)
        10000.0

    Source:
        Karras et al., Analyzing and improving the training dynamics of diffusion models, 2024, equations 122 to 126.
    """
    return check_positive("duration", duration) / (_check_exponent(exponent) + 2)


def mean_age_to_exponent(mean_age: float, duration: float) -> float:
    """Returns the exponent of the power profile that has a given mean age at the end of a run.

    Args:
        mean_age: Mean age at the end, above 0 and below `duration`; half of it is the uniform average.
        duration: Length of the run, in the same unit.

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
    """Returns the standard deviation of the ages under a constant decay, as a share of a run.

        relative_std = sqrt(decay) / ((1 - decay) * duration)

    A power profile of this relative_std is as wide at the end of the run. Where the result is not below 12 ** -0.5,
    the run is too short for the decay: no power profile is as wide.

    Args:
        decay: Decay per step, in [0, 1].
        duration: Length of the run in steps.

    Raises:
        ValueError: `decay` is outside [0, 1], or `duration` not above 0.

    Example:
        >>> round(decay_to_relative_std(0.9999, 100_000), 6)
        0.099995
    """
    decay, duration = check_decay("decay", decay), check_positive("duration", duration)
    return math.sqrt(decay) / ((1 - decay) * duration) if decay < 1 else math.inf


def relative_std_to_decay(relative_std: float, duration: float) -> float:
    """Returns the constant decay whose ages have a standard deviation that is a given share of a run.

    The inverse of `decay_to_relative_std`.

    Args:
        relative_std: Standard deviation of the ages as a share of the run, above 0.
        duration: Length of the run in steps.

    Raises:
        ValueError: One of them is not above 0.

    Example:
        >>> round(relative_std_to_decay(0.10, 100_000), 6)
        0.9999
    """
    std = check_positive("relative_std", relative_std) * check_positive("duration", duration)
    # The root of std * (1 - x**2) = x for x = sqrt(decay), written without a difference.
    return (2 * std / (1 + math.sqrt(1 + 4 * std * std))) ** 2


def scale_decay(decay: float, kappa: float) -> float:
    """Returns the decay for a batch that is `kappa` times as large: decay ** kappa.

    The half-life then stays the same number of samples. 1 - kappa * (1 - decay) is only close to it.

    Args:
        decay: Decay per step at the batch size that it was chosen for, in [0, 1].
        kappa: New batch size over the old one, above 0.

    Raises:
        ValueError: `decay` is outside [0, 1], or `kappa` not above 0.

    Example:
        >>> round(scale_decay(0.9999, 8), 8)
        0.99920028

    Source:
        Busbridge et al., How to scale your EMA, 2023, the EMA scaling rule.
    """
    return check_decay("decay", decay) ** check_positive("kappa", kappa)


def _check_exponent(exponent: float) -> float:
    check_number("exponent", exponent)
    if -1 < exponent < math.inf:
        return float(exponent)
    raise ValueError(f"exponent={exponent!r} must be above -1 and finite: the mass of an average must grow")
