"""What holds for every profile: the contract of `Profile`, its derived quantities, saving and comparing."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import pkgutil
import random
from typing import Any

import pytest

import polyak.profiles
from polyak.profiles import Exponential, Power, Profile, Schedule, Uniform, profile_from_description

PROFILES = [
    Uniform(),
    Power(),
    Power(relative_std=0.28),
    Power(exponent=0.0),
    Power(exponent=-0.5),
    Power(exponent=40.0),
    Exponential(0.9),
    Exponential(0.0),
    Exponential(1.0),
    Exponential(half_life=3.5),
    Exponential(mean_age=12.0),
    Exponential(0.9, debias=True),
    Exponential(half_life=100.0, debias=True),
    Schedule("inverse-gamma", decay=0.95),
    Schedule("tensorflow"),
    Schedule("cosine", num_steps=30),
    Schedule("polynomial", eta=1),
]
FORGETTING = [profile for profile in PROFILES if profile.initial_weight(1) == 0]

every_profile = pytest.mark.parametrize("profile", PROFILES, ids=repr)


def averaged(profile: Profile, values: dict[int, float]) -> float:
    """The average of values at increasing times, by the update rule and nothing else."""
    times = list(values)
    average, previous = values[times[0]], times[0]
    for now in times[1:]:
        average += profile.weight(previous, now) * (values[now] - average)
        previous = now
    return average


def test_the_names_of_the_room() -> None:
    public = {name for name in vars(polyak.profiles) if not name.startswith("_")}
    modules = {module.name for module in pkgutil.iter_modules(polyak.profiles.__path__)}
    assert public - modules == {
        "Exponential",
        "Power",
        "Profile",
        "Schedule",
        "Uniform",
        "decay_to_relative_std",
        "mean_age_to_exponent",
        "named_profiles",
        "profile_from_description",
        "register_schedule",
        "relative_std_to_decay",
        "scale_decay",
    }


@every_profile
def test_growth_is_zero_where_no_time_passes(profile: Profile) -> None:
    assert [profile.growth(time, time) for time in (0, 1, 7)] == [0.0, 0.0, 0.0]
    assert [profile.weight(time, time) for time in (0, 1, 7)] == [0.0, 0.0, 0.0]


@every_profile
def test_growth_is_additive(profile: Profile) -> None:
    parts = [profile.growth(5, 6), profile.growth(6, 11), profile.growth(11, 40)]
    assert all(part >= 0 for part in parts)
    assert math.fsum(parts) == pytest.approx(profile.growth(5, 40), rel=1e-13)


@every_profile
def test_weight_is_the_share_of_the_growth(profile: Profile) -> None:
    assert profile.weight(5, 9) == -math.expm1(-profile.growth(5, 9))


@pytest.mark.parametrize("profile", FORGETTING, ids=repr)
def test_initial_weights_are_forgotten_at_once(profile: Profile) -> None:
    assert profile.growth(0, 1) == math.inf
    assert profile.weight(0, 1) == 1.0
    assert profile.initial_weight(0) == 1.0


@every_profile
def test_weights_are_the_shares_in_the_average(profile: Profile) -> None:
    random.seed(0)
    values = {time: random.gauss(0, 1) for time in (0, 1, 2, 3, 5, 9, 10, 31)}
    shares = profile.weights(values)
    expected = math.fsum(share * value for share, value in zip(shares, values.values(), strict=True))
    assert averaged(profile, values) == pytest.approx(expected, rel=1e-13)
    assert math.fsum(shares) == pytest.approx(1, rel=1e-14)
    assert shares[0] == pytest.approx(profile.initial_weight(31), rel=1e-13)


@every_profile
def test_weights_leave_the_initial_weights_out(profile: Profile) -> None:
    assert profile.weights([4, 7, 8]) == profile.weights([0, 4, 7, 8])[1:]
    assert profile.weights([0]) == [1.0]
    assert math.fsum(profile.weights([4, 7, 8])) == pytest.approx(1 - profile.initial_weight(8), abs=1e-15)


@every_profile
def test_averaging_a_trajectory_decays_the_learning_rate(profile: Profile) -> None:
    random.seed(1)
    num_steps = 25
    updates = [random.gauss(0, 1) for _ in range(num_steps)]
    trajectory = {step: math.fsum(updates[:step]) for step in range(num_steps + 1)}
    decayed = math.fsum(
        update * profile.learning_rate_decay(step, num_steps) for step, update in enumerate(updates, start=1)
    )
    assert averaged(profile, trajectory) == pytest.approx(decayed, rel=1e-12, abs=1e-14)


def test_learning_rate_decay_in_closed_form() -> None:
    num_steps = 20
    for step in range(1, num_steps + 1):
        before = (step - 1) / num_steps
        assert Uniform().learning_rate_decay(step, num_steps) == pytest.approx(1 - before)
        assert Power(exponent=3).learning_rate_decay(step, num_steps) == pytest.approx(1 - before**4)
        decay = Exponential(0.8).learning_rate_decay(step, num_steps)
        assert decay == pytest.approx(1 - 0.8 ** (num_steps - step + 1))


@pytest.mark.parametrize("step", range(1, 50))
def test_weight_of_a_step_is_the_one_of_the_literature(step: int) -> None:
    def weight(profile: Profile) -> float:
        return profile.weight(step - 1, step)

    assert weight(Uniform()) == pytest.approx(1 / step, rel=1e-14)
    assert weight(Power(exponent=2.5)) == pytest.approx(1 - (1 - 1 / step) ** 3.5, rel=1e-14)
    assert weight(Exponential(0.7)) == pytest.approx(1 - 0.7, rel=1e-14)
    debiased = 0.7 * (1 - 0.7 ** (step - 1)) / (1 - 0.7**step)
    assert weight(Exponential(0.7, debias=True)) == pytest.approx(1 - debiased, rel=1e-13)
    assert weight(Schedule("polynomial", eta=1)) == pytest.approx(2 / (step + 1), rel=1e-13)


def test_debias_is_the_correction_of_adam() -> None:
    # An average that begins at zero, divided by 1 - decay ** t.
    random.seed(2)
    values = [random.gauss(0, 1) for _ in range(30)]
    biased = 0.0
    for value in values:
        biased = 0.9 * biased + (1 - 0.9) * value
    average = averaged(Exponential(0.9, debias=True), dict(enumerate([123.0, *values])))
    assert average == pytest.approx(biased / (1 - 0.9 ** len(values)), rel=1e-13)


def test_power_has_its_relative_std() -> None:
    # Updated step by step, it is as wide as the continuous profile, whose mean lies at (exponent + 1)/(exponent + 2).
    num_steps = 4000
    shares = Power(relative_std=0.10).weights(range(1, num_steps + 1))
    times = [step / num_steps for step in range(1, num_steps + 1)]
    mean = math.fsum(share * time for share, time in zip(shares, times, strict=True))
    variance = math.fsum(share * (time - mean) ** 2 for share, time in zip(shares, times, strict=True))
    assert math.sqrt(variance) == pytest.approx(0.10, abs=1e-6)
    assert round(mean, 5) == 0.88823


@every_profile
def test_description_restores_an_equal_profile(profile: Profile) -> None:
    restored = profile_from_description(json.loads(json.dumps(profile.describe(), allow_nan=False)))
    assert restored == profile
    assert hash(restored) == hash(profile)
    assert repr(restored) == repr(profile)
    assert restored.describe() == profile.describe()
    assert restored.growth(3, 17) == profile.growth(3, 17)


def test_description_is_what_was_given() -> None:
    assert Uniform().describe() == {"profile": "uniform"}
    assert Power().describe() == {"profile": "power", "relative_std": 0.10}
    assert Power(exponent=6.94).describe() == {"profile": "power", "exponent": 6.94}
    assert Exponential(0.999).describe() == {"profile": "exponential", "decay": 0.999}
    assert Exponential(half_life=2000, debias=True).describe() == {
        "profile": "exponential",
        "half_life": 2000.0,
        "debias": True,
    }
    assert Schedule("tensorflow", decay=0.99).describe() == {
        "profile": "schedule",
        "name": "tensorflow",
        "arguments": {"decay": 0.99},
    }


@every_profile
def test_repr_is_the_call(profile: Profile) -> None:
    assert eval(repr(profile), vars(polyak.profiles).copy()) == profile


@every_profile
def test_profiles_are_values(profile: Profile) -> None:
    for twin in (copy.deepcopy(profile), pickle.loads(pickle.dumps(profile))):
        assert twin == profile
        assert hash(twin) == hash(profile)
        assert repr(twin) == repr(profile)
    assert [profile == other for other in PROFILES].count(True) == 1
    for field in dataclasses.fields(profile):  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(profile, field.name, None)


def test_equal_is_what_grows_equally() -> None:
    assert Exponential(0.5) == Exponential(half_life=1) == Exponential(mean_age=1)
    assert Exponential(0.5) != Exponential(0.5, debias=True)
    assert Power(relative_std=0.10) == Power(exponent=Power(relative_std=0.10).exponent)
    assert Schedule("tensorflow") == Schedule("tensorflow", decay=0.999)
    assert Power(exponent=0) != Uniform()
    assert len({Power(), Power(relative_std=0.10), Power(relative_std=0.05)}) == 2


def test_a_profile_keeps_the_number_it_was_given() -> None:
    assert Power(relative_std=0.07).relative_std == 0.07
    assert Power(exponent=6.94).exponent == 6.94
    assert Exponential(0.9997).decay == 0.9997
    assert Exponential(half_life=1).decay == pytest.approx(0.5, rel=1e-15)
    assert Exponential(mean_age=999).decay == pytest.approx(0.999, rel=1e-15)


@every_profile
@pytest.mark.parametrize(
    ("previous", "now", "message"),
    [
        (7, 5, "now=5 lies before previous=7: time must not go back; pass the total so far, not what was added"),
        (-1, 5, "previous=-1 and now=5 must be finite and at least 0: pass the steps"),
        (0, math.inf, "previous=0 and now=inf must be finite"),
        (0, math.nan, "previous=0 and now=nan must be finite"),
        (math.nan, 3, "previous=nan and now=3 must be finite"),
        (3, -4, "previous=3 and now=-4 must be finite and at least 0"),
    ],
)
def test_impossible_times(profile: Profile, previous: float, now: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile.growth(previous, now)


@every_profile
def test_times_of_weights_must_increase(profile: Profile) -> None:
    with pytest.raises(ValueError, match="times is empty: pass the times of the updates"):
        profile.weights([])
    with pytest.raises(ValueError, match="times must increase, but 2 is there twice: leave one of the two out"):
        profile.weights([1, 2, 2])
    with pytest.raises(ValueError, match="now=2 lies before previous=3"):
        profile.weights([1, 3, 2])


@pytest.mark.parametrize("step", [0, -1, 6, math.nan])
def test_steps_are_counted_from_1(step: float) -> None:
    with pytest.raises(ValueError, match=f"step={step} must lie between 1, the first step, and now=5"):
        Uniform().learning_rate_decay(step, 5)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "describes no known profile: 'profile' must be one of"),
        ({"profile": "cubic"}, "must be one of \\['exponential', 'power', 'schedule', 'uniform'\\]"),
        ({"profile": ["power"]}, "describes no known profile"),
        ({"profile": "power", "sigma": 0.1}, "unexpected keyword argument 'sigma'"),
        ({"profile": "power", "exponent": "7"}, "exponent='7' must be a number, not str"),
        ({"profile": "exponential", "decay": 1.5}, "decay=1.5 is outside \\[0, 1\\]"),
        ({"profile": "uniform", "decay": 0.9}, "does not describe a profile"),
        ({"profile": "schedule", "name": "tensorflow"}, "does not describe a profile"),
        ({"profile": "schedule", "name": "tensorflow", "arguments": 3}, "does not describe a profile"),
        ({"profile": "schedule", "name": "no-such", "arguments": {}}, "no schedule is called 'no-such'"),
    ],
)
def test_descriptions_that_describe_nothing(description: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_from_description(description)


class Halving(Profile):
    """A profile of one's own: only the two abstract methods."""

    def growth(self, previous: float, now: float) -> float:
        return (now - previous) * math.log(2)

    def describe(self) -> dict[str, Any]:
        return {"profile": "halving"}


def test_a_profile_of_ones_own_has_everything() -> None:
    profile, twin = Halving(), Exponential(half_life=1)
    assert profile.weights([0, 1, 5]) == twin.weights([0, 1, 5])
    assert profile.mean_age(8) == pytest.approx(twin.mean_age(8), rel=1e-14)
    assert profile.half_life(8) == pytest.approx(1.0, rel=1e-14)
    assert repr(profile) == "Halving()"
