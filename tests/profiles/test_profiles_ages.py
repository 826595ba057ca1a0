"""Mean ages and half-lives: closed forms against sums over the shares themselves."""

from __future__ import annotations

import math

import mpmath
import pytest

from polyak.profiles import Exponential, Power, Profile, Schedule, Uniform, register_schedule


@register_schedule("constant-for-tests")
def constant(step: int, *, decay: float) -> float:
    return decay


def summed_mean_age(profile: Profile, now: int) -> float:
    shares = profile.weights(range(now + 1))
    return math.fsum(share * (now - time) for time, share in enumerate(shares))


STEPWISE = [
    Exponential(0.9),
    Exponential(0.99),
    Exponential(0.9999),
    Exponential(0.0),
    Exponential(1.0),
    Exponential(half_life=7),
    Exponential(0.9, debias=True),
    Exponential(0.9999, debias=True),
    Exponential(0.0, debias=True),
    Schedule("inverse-gamma"),
    Schedule("tensorflow"),
    Schedule("cosine", num_steps=100),
    Schedule("polynomial", eta=3),
]


@pytest.mark.parametrize("now", [0, 1, 2, 10, 300])
@pytest.mark.parametrize("profile", STEPWISE, ids=repr)
def test_mean_age_of_an_average_updated_at_every_step(profile: Profile, now: int) -> None:
    assert profile.mean_age(now) == pytest.approx(summed_mean_age(profile, now), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("profile", [Uniform(), Power(), Power(exponent=-0.5), Power(exponent=30)], ids=repr)
def test_mean_age_of_an_average_that_grows_with_the_run(profile: Profile) -> None:
    # The closed form is the limit of many updates: each at the end of its step, half a step late.
    assert profile.mean_age(3000) == pytest.approx(summed_mean_age(profile, 3000) + 0.5, rel=1e-3)


def test_mean_age_in_closed_form() -> None:
    assert Uniform().mean_age(10) == 5
    assert Power(exponent=3).mean_age(10) == 2
    assert Exponential(0.999).mean_age() == pytest.approx(999, rel=1e-12)
    assert Exponential(mean_age=250).mean_age() == pytest.approx(250, rel=1e-14)
    assert Exponential(0.9).mean_age(20) == pytest.approx(0.9 * (1 - 0.9**20) / (1 - 0.9), rel=1e-14)
    assert Exponential(0.9, debias=True).mean_age() == pytest.approx(9, rel=1e-14)
    assert Exponential(0.9, debias=True).mean_age(20) == pytest.approx(9 - 20 * 0.9**20 / (1 - 0.9**20), rel=1e-13)


def test_ages_in_the_limit() -> None:
    for profile in (Uniform(), Power(), Exponential(1)):
        assert profile.mean_age() == profile.half_life() == math.inf
    for profile in (Exponential(0), Exponential(0, debias=True)):
        assert profile.mean_age() == profile.half_life() == 0


@pytest.mark.parametrize("decay", [0.5, 0.9999, 0.9999999])
@pytest.mark.parametrize("now", [1, 2, 3, 1000, 10**6, 10**12])
def test_mean_age_does_not_cancel(decay: float, now: int) -> None:
    with mpmath.workdps(80):
        exact, kept = mpmath.mpf(decay), mpmath.mpf(decay) ** now
        plain = exact * (1 - kept) / (1 - exact)
        debiased = exact / (1 - exact) - now * kept / (1 - kept)
        assert Exponential(decay).mean_age(now) == pytest.approx(float(plain), rel=1e-12)
        assert Exponential(decay, debias=True).mean_age(now) == pytest.approx(float(debiased), rel=1e-12)


@pytest.mark.parametrize("now", [1, 30, 1000])
@pytest.mark.parametrize(
    "profile",
    [
        Uniform(),
        Power(),
        Power(exponent=-0.5),
        Exponential(half_life=10),
        Exponential(half_life=10**6),
        Exponential(half_life=10, debias=True),
        Exponential(half_life=10**6, debias=True),
    ],
    ids=repr,
)
def test_half_life_halves_the_mass(profile: Profile, now: int) -> None:
    half_life = profile.half_life(now)
    if profile.initial_weight(now) >= 0.5:
        assert half_life == now
    else:
        assert profile.growth(now - half_life, now) == pytest.approx(math.log(2), rel=1e-12)


def test_half_life_in_closed_form() -> None:
    assert Uniform().half_life(10) == 5
    assert Power(exponent=1).half_life(10) == pytest.approx(10 * (1 - 0.5**0.5), rel=1e-14)
    assert Exponential(half_life=123).half_life() == pytest.approx(123, rel=1e-15)
    assert Exponential(half_life=123, debias=True).half_life() == pytest.approx(123, rel=1e-15)
    assert Exponential(0.9999).half_life() == pytest.approx(6931.1, abs=0.05)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("now", [0, 1, 5, 20_000])
def test_a_constant_schedule_is_the_exponential(decay: float, now: int) -> None:
    schedule, exponential = Schedule("constant-for-tests", decay=decay), Exponential(decay)
    assert schedule.growth(0, now) == pytest.approx(exponential.growth(0, now), rel=1e-13)
    assert schedule.initial_weight(now) == pytest.approx(exponential.initial_weight(now), rel=1e-12)
    assert schedule.mean_age(now) == pytest.approx(exponential.mean_age(now), rel=1e-12)
    assert schedule.half_life(now) == pytest.approx(exponential.half_life(now), rel=1e-12)


@pytest.mark.parametrize("profile", [Uniform(), Power(), Exponential(0.9), Schedule("tensorflow")], ids=repr)
@pytest.mark.parametrize("now", [-1, math.nan])
def test_impossible_ages(profile: Profile, now: float) -> None:
    with pytest.raises(ValueError, match=f"now={now} must be at least 0: pass the time since the average was made"):
        profile.mean_age(now)
    with pytest.raises(ValueError, match=f"now={now} must be at least 0"):
        profile.half_life(now)


@pytest.mark.parametrize("now", [math.inf, 2.5])
def test_ages_of_a_schedule_are_summed_over_steps(now: float) -> None:
    profile = Schedule("tensorflow")
    message = rf"now={now} must be a whole number of steps: the ages of Schedule\('tensorflow', decay=0.999\)"
    for age in (profile.mean_age, profile.half_life, profile.initial_weight):
        with pytest.raises(ValueError, match=message):
            age(now)
