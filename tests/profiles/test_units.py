"""Numbers that name the length of an average, in one another: against the tables of the literature, and both ways."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.profiles import (
    Exponential,
    Power,
    decay_to_relative_std,
    mean_age_to_exponent,
    relative_std_to_decay,
    scale_decay,
)

# relative_std -> exponent (sigma_rel and gamma of Karras et al. 2024), ten digits after the point.
EXPONENTS = {
    0.015: 63.6589342317,
    0.020: 46.9895821576,
    0.025: 36.9868397124,
    0.030: 30.3173715769,
    0.040: 21.9782497619,
    0.050: 16.9721986023,
    0.060: 13.6325312573,
    0.070: 11.2449394479,
    0.075: 10.2891164490,
    0.080: 9.4522549657,
    0.090: 8.0560364940,
    0.100: 6.9372039376,
    0.120: 5.2537650256,
    0.130: 4.6035967815,
    0.150: 3.5578687749,
    0.200: 1.8262137799,
    0.250: 0.7198239580,
    0.280: 0.1693439938,
}

# The same as printed in figure 24 of the paper.
PRINTED_EXPONENTS = {0.25: 0.72, 0.20: 1.83, 0.15: 3.56, 0.10: 6.94, 0.05: 16.97}

# decay -> (1 / (1 - decay), half-life).
LENGTHS = {
    0.9: (10, 6.6),
    0.99: (100, 69.0),
    0.995: (200, 138.3),
    0.999: (1000, 692.8),
    0.9995: (2000, 1385.9),
    0.9998: (5000, 3465.4),
    0.9999: (10_000, 6931.1),
    0.99995: (20_000, 13_862.6),
    0.99999: (100_000, 69_314.4),
}

# kappa -> decay at a batch kappa times as large, for 0.9999 (Busbridge et al. 2023).
SCALED = {0.25: (0.9999749991, 10), 2: (0.99980001, 8), 4: (0.99960006, 8), 8: (0.99920028, 8)}


@pytest.mark.parametrize(("relative_std", "exponent"), EXPONENTS.items())
def test_exponents_of_the_table(relative_std: float, exponent: float) -> None:
    assert round(Power(relative_std=relative_std).exponent, 10) == exponent
    assert Power(exponent=exponent).relative_std == pytest.approx(relative_std, abs=1e-10)


@pytest.mark.parametrize(("relative_std", "exponent"), PRINTED_EXPONENTS.items())
def test_exponents_of_the_paper(relative_std: float, exponent: float) -> None:
    assert round(Power(relative_std=relative_std).exponent, 2) == exponent


@given(st.floats(min_value=1e-300, max_value=12**-0.5, exclude_max=True))
def test_the_exponent_is_the_root_of_the_cubic(relative_std: float) -> None:
    exponent = Power(relative_std=relative_std).exponent
    with mpmath.workdps(1000 if relative_std < 1e-100 else 320):
        # gamma**3 + 7 gamma**2 + (16 - s**-2) gamma + (12 - s**-2) = 0, from where we are by Newton.
        tau, root = mpmath.mpf(relative_std) ** -2, mpmath.mpf(max(exponent, 1e-30))
        for _ in range(12):
            value = ((root + 7) * root + 16 - tau) * root + 12 - tau
            root -= value / ((3 * root + 14) * root + 16 - tau)
        # Near 0 an exponent is as exact as relative_std lets it be: to the last digit of exponent + 2.
        assert abs(exponent - root) <= 8 * 2**-53 * (root + 2)


@pytest.mark.parametrize(("decay", "lengths"), LENGTHS.items())
def test_lengths_of_the_table(decay: float, lengths: tuple[float, float]) -> None:
    memory, half_life = lengths
    assert Exponential(decay).mean_age() + 1 == pytest.approx(memory, rel=1e-10)
    assert round(Exponential(decay).half_life(), 1) == half_life
    assert Exponential(mean_age=memory - 1).decay == pytest.approx(decay, rel=1e-15)
    assert Exponential(half_life=half_life).decay == pytest.approx(decay, abs=1e-3)


@pytest.mark.parametrize(("kappa", "scaled"), SCALED.items())
def test_scaling_the_batch(kappa: float, scaled: tuple[float, int]) -> None:
    decay, digits = scaled
    assert round(scale_decay(0.9999, kappa), digits) == decay
    half_life = Exponential(scale_decay(0.9999, kappa)).half_life()
    assert half_life * kappa == pytest.approx(Exponential(0.9999).half_life())


@given(st.floats(min_value=0.01, max_value=1 - 1e-9))
def test_decays_there_and_back(decay: float) -> None:
    assert Exponential(half_life=Exponential(decay).half_life()).decay == pytest.approx(decay, rel=1e-14)
    assert Exponential(mean_age=Exponential(decay).mean_age()).decay == pytest.approx(decay, rel=1e-14)
    assert relative_std_to_decay(decay_to_relative_std(decay, 1000), 1000) == pytest.approx(decay, rel=1e-14)


@given(st.floats(min_value=1e-3, max_value=1e6))
def test_exponents_there_and_back(exponent: float) -> None:
    back = Power(relative_std=Power(exponent=exponent).relative_std).exponent
    assert back + 2 == pytest.approx(exponent + 2, rel=1e-14)
    assert mean_age_to_exponent(Power(exponent=exponent).mean_age(1e5), 1e5) == pytest.approx(exponent, rel=1e-11)


def test_a_decay_is_as_wide_as_its_relative_std() -> None:
    decay, duration = 0.98, 3000
    shares = Exponential(decay).weights(range(1, duration + 1))
    ages = [duration - time for time in range(1, duration + 1)]
    mean = math.fsum(share * age for share, age in zip(shares, ages, strict=True))
    variance = math.fsum(share * (age - mean) ** 2 for share, age in zip(shares, ages, strict=True))
    assert decay_to_relative_std(decay, duration) == pytest.approx(math.sqrt(variance) / duration, rel=1e-10)


def test_the_ends_of_the_range() -> None:
    assert (Exponential(0).half_life(), Exponential(1).half_life()) == (0, math.inf)
    assert (Exponential(0).mean_age(), Exponential(1).mean_age()) == (0, math.inf)
    assert (decay_to_relative_std(0, 10), decay_to_relative_std(1, 10)) == (0, math.inf)
    assert Power(exponent=0).relative_std == 12**-0.5
    assert mean_age_to_exponent(50, 100) == 0
    assert (scale_decay(0, 2), scale_decay(1, 2)) == (0, 1)


@pytest.mark.parametrize(
    ("convert", "arguments", "message"),
    [
        (
            mean_age_to_exponent,
            (100, 100),
            "mean_age=100.0 must be below duration=100.0: nothing is older than the run",
        ),
        (decay_to_relative_std, (0.9, -1), "duration=-1 must be above 0"),
        (relative_std_to_decay, (0, 10), "relative_std=0 must be above 0"),
        (scale_decay, (0.9, 0), "kappa=0 must be above 0"),
        (scale_decay, (1.5, 2), r"decay=1.5 is outside \[0, 1\]; .* Exponential\(half_life=1.5\)"),
    ],
)
def test_impossible_numbers(convert: Callable[..., float], arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(*arguments)
