"""Growth and weight of every profile to 1e-12, against 120 digits, over all times and lengths that can occur."""

from __future__ import annotations

import mpmath
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from polyak.profiles import Exponential, Power, Profile, Uniform
from polyak.profiles.base import running_sums

RELATIVE_ERROR = 1e-12

times = st.one_of(st.integers(min_value=1, max_value=10**15).map(float), st.floats(min_value=1e-3, max_value=1e15))
# Few steps late, or many: the smallest possible growth and the largest.
delays = st.one_of(st.integers(min_value=1, max_value=1000).map(float), st.floats(min_value=1e-3, max_value=1e15))
decays = st.one_of(
    st.floats(min_value=1e-6, max_value=1), st.floats(min_value=0, max_value=12).map(lambda x: 1 - 10**-x)
)
lengths = st.floats(min_value=1e-2, max_value=1e15)
exponents = st.floats(min_value=-0.99, max_value=1e4)


def check(profile: Profile, previous: float, now: float, kept: mpmath.mpf) -> None:
    """Compares growth and weight with what the mass of `previous` is of that of `now`."""
    growth, weight = profile.growth(previous, now), profile.weight(previous, now)
    expected_growth, expected_weight = -mpmath.log(kept), 1 - kept
    assert abs(growth - expected_growth) <= RELATIVE_ERROR * expected_growth
    assert abs(weight - expected_weight) <= RELATIVE_ERROR * expected_weight


def kept_by_exponential(rate: mpmath.mpf, previous: float, now: float, *, debias: bool) -> mpmath.mpf:
    if debias:
        return mpmath.expm1(rate * previous) / mpmath.expm1(rate * now)
    return mpmath.exp(-rate * (mpmath.mpf(now) - previous))


@settings(deadline=None, max_examples=300)
@given(times, delays)
@example(1e12, 1.0)
def test_uniform(previous: float, delay: float) -> None:
    now = previous + delay
    assume(now > previous)
    with mpmath.workdps(120):
        check(Uniform(), previous, now, mpmath.mpf(previous) / now)


@settings(deadline=None, max_examples=300)
@given(exponents, times, delays)
@example(6.94, 1e12, 1.0)
def test_power(exponent: float, previous: float, delay: float) -> None:
    now = previous + delay
    assume(now > previous)
    with mpmath.workdps(120):
        check(Power(exponent=exponent), previous, now, (mpmath.mpf(previous) / now) ** (mpmath.mpf(exponent) + 1))


@settings(deadline=None, max_examples=300)
@given(decays, times, delays, st.booleans())
@example(0.9999999, 1e12, 1.0, False)
@example(0.9999999, 1e12, 1.0, True)
@example(0.9999999, 1.0, 1.0, True)
def test_exponential_by_decay(decay: float, previous: float, delay: float, debias: bool) -> None:
    now = previous + delay
    assume(now > previous and 0 < decay < 1)
    with mpmath.workdps(120):
        kept = kept_by_exponential(-mpmath.log(decay), previous, now, debias=debias)
        check(Exponential(decay, debias=debias), previous, now, kept)


@settings(deadline=None, max_examples=300)
@given(lengths, times, delays, st.booleans())
def test_exponential_by_length(length: float, previous: float, delay: float, debias: bool) -> None:
    now = previous + delay
    assume(now > previous)
    with mpmath.workdps(120):
        kept = kept_by_exponential(mpmath.log(2) / length, previous, now, debias=debias)
        check(Exponential(half_life=length, debias=debias), previous, now, kept)
        kept = kept_by_exponential(mpmath.log1p(1 / mpmath.mpf(length)), previous, now, debias=debias)
        check(Exponential(mean_age=length, debias=debias), previous, now, kept)


def test_shares_of_many_updates_are_as_exact_as_those_of_one() -> None:
    num_steps = 200_000
    shares = Exponential(0.9999).weights(range(1, num_steps + 1))
    with mpmath.workdps(50):
        decay = mpmath.mpf(0.9999)
        for age in (0, 1, 1000, 50_000, num_steps - 1):
            expected = (1 - decay) * decay**age
            assert abs(shares[num_steps - 1 - age] - expected) <= RELATIVE_ERROR * expected


def test_running_sums_lose_nothing() -> None:
    *_, total = running_sums([0.1] * 1_000_000)
    assert total == pytest.approx(float(mpmath.mpf(0.1) * 1_000_000), rel=1e-15)
    assert list(running_sums([1.0, float("inf"), 1.0])) == [1.0, float("inf"), float("inf")]
