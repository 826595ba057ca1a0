"""Schedules: each named one against its library's own numbers, and functions of one's own."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch

from polyak.profiles import Schedule, Uniform, register_schedule


@pytest.mark.parametrize(("step", "decay"), [(1, 0.0), (2, 0.37004), (11, 0.79782), (101, 0.95389)])
def test_inverse_gamma_gives_the_numbers_of_timm(step: int, decay: float) -> None:
    # timm 1.0.31, ModelEmaV3(use_warmup=True).get_decay(step); its training script counts the first update as 1.
    assert round(Schedule("inverse-gamma").decay(step), 5) == decay


@pytest.mark.parametrize(
    ("power", "passed", "decay"),
    [
        (2 / 3, 1000, 0.99),
        (2 / 3, 31_622, 0.999),
        (2 / 3, 10**6, 0.9999),
        (3 / 4, 9999, 0.999),
        (3 / 4, 215_442, 0.9999),
    ],
)
def test_inverse_gamma_gives_the_numbers_of_k_diffusion(power: float, passed: int, decay: float) -> None:
    # The documentation of k-diffusion's EMAWarmup, which calls the first update epoch 0.
    profile = Schedule("inverse-gamma", power=power, decay=1.0)
    assert profile.decay(passed + 1) == pytest.approx(decay, abs=(1 - decay) * 2e-3)


def test_inverse_gamma_with_power_1_is_uniform() -> None:
    profile = Schedule("inverse-gamma", power=1.0, decay=1.0)
    for step in (1, 2, 3, 100):
        assert profile.weight(step - 1, step) == pytest.approx(Uniform().weight(step - 1, step), rel=1e-13)


@pytest.mark.parametrize(
    ("arguments", "step", "decay"),
    [
        ({"update_after": 100}, 101, 0.0),
        ({"update_after": 100}, 102, 1 - 2 ** (-2 / 3)),
        ({"min_decay": 0.5}, 1, 0.0),
        ({"min_decay": 0.5}, 2, 0.5),
        ({"min_decay": 0.99, "decay": 0.9}, 2, 0.99),
        ({"gamma": 10}, 11, 1 - 2 ** (-2 / 3)),
        ({"decay": 0.9}, 10**6, 0.9),
    ],
)
def test_inverse_gamma_within_bounds(arguments: dict[str, float], step: int, decay: float) -> None:
    assert Schedule("inverse-gamma", **arguments).decay(step) == pytest.approx(decay, rel=1e-15)


def test_inverse_gamma_is_the_one_of_ema_pytorch() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    theirs = ema_pytorch.EMA(torch.nn.Linear(1, 1), beta=0.995, update_after_step=100, min_value=0.2)
    ours = Schedule("inverse-gamma", decay=0.995, update_after=100, min_decay=0.2)
    for step in (1, 50, 100, 101, 102, 103, 201, 1001, 10_000):
        theirs.step.fill_(step)
        assert ours.decay(step) == pytest.approx(theirs.get_current_decay(), abs=1e-6)


@pytest.mark.parametrize(("call", "decay"), [(102, 0.370), (201, 0.954), (1001, 0.989)])
def test_inverse_gamma_gives_the_numbers_of_ema_pytorch(call: int, decay: float) -> None:
    assert round(Schedule("inverse-gamma", update_after=100).decay(call), 3) == decay


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_tensorflow_is_the_one_of_torch_ema(decay: float) -> None:
    torch_ema = pytest.importorskip("torch_ema")
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    theirs = torch_ema.ExponentialMovingAverage([parameter], decay)
    ours = Schedule("tensorflow", decay=decay)
    for step in range(1, 40):
        theirs.shadow_params[0].zero_()
        theirs.update()
        assert ours.weight(step - 1, step) == pytest.approx(theirs.shadow_params[0].item(), rel=1e-14)


def test_tensorflow_is_a_power_profile_until_it_is_capped() -> None:
    # The mass is that of polynomial averaging with eta 8, two steps further on, and so is its width.
    capped = math.ceil((10 * 0.999 - 1) / (1 - 0.999))
    assert capped == 8990
    profile, polynomial = Schedule("tensorflow", decay=0.999), Schedule("polynomial", eta=8)
    assert profile.growth(10, capped - 1) == pytest.approx(polynomial.growth(12, capped + 1), rel=1e-12)
    assert profile.decay(capped - 1) < 0.999 == profile.decay(capped + 1)

    shares = Schedule("tensorflow", decay=0.9999).weights(range(1, 401))
    mean = math.fsum(share * step for step, share in enumerate(shares, start=1))
    variance = math.fsum(share * (step - mean) ** 2 for step, share in enumerate(shares, start=1))
    assert round(math.sqrt(variance) / 400, 4) == 0.0918


@pytest.mark.parametrize(("step", "decay"), [(1, 0.0), (2, 0.1818), (1000, 0.9911), (10**7, 0.9999)])
def test_diffusers_gives_the_numbers_of_diffusers(step: int, decay: float) -> None:
    # diffusers 0.42.1, EMAModel(use_ema_warmup=False).get_decay(optimization_step), which is 1 at the first update.
    assert round(Schedule("diffusers").decay(step), 4) == decay
    assert Schedule("diffusers", update_after=7).decay(step + 7) == Schedule("diffusers").decay(step)


def test_diffusers_within_bounds() -> None:
    profile = Schedule("diffusers", decay=0.9, min_decay=0.3)
    assert [profile.decay(step) for step in (1, 2, 200)] == [0.0, 0.3, 0.9]


@pytest.mark.parametrize("num_updates", [1, 10, 2000, 20_000])
def test_ultralytics_is_the_formula_of_ultralytics(num_updates: int) -> None:
    # ModelEMA adds 1 to its number of updates before it computes the decay.
    expected = 0.9999 * (1 - math.exp(-num_updates / 2000))
    assert Schedule("ultralytics").decay(num_updates) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("iteration", [0, 1, 500, 999])
def test_cosine_is_the_formula_of_byol_and_dino(iteration: int) -> None:
    # DINO reads momentum_schedule[iteration], BYOL calls target_ema(global_step): both 0 at the first update.
    expected = 1 + 0.5 * (0.996 - 1) * (1 + math.cos(math.pi * iteration / 1000))
    profile = Schedule("cosine", base=0.996, num_steps=1000)
    assert profile.decay(iteration + 1) == pytest.approx(expected, rel=1e-15)


def test_cosine_ends_in_a_fixed_average() -> None:
    profile = Schedule("cosine", num_steps=10)
    assert profile.decay(1) == pytest.approx(0.996, rel=1e-15)
    assert profile.decay(10) < 1
    assert [profile.decay(step) for step in (11, 12, 1000)] == [1.0, 1.0, 1.0]
    assert profile.growth(10, 1000) == 0.0


@pytest.mark.parametrize(("iteration", "momentum"), [(1, 0.1), (2, 0.0775), (5, 0.01), (6, 0.01)])
def test_linear_is_the_warm_up_of_ignite(iteration: int, momentum: float) -> None:
    # EMAHandler(momentum=0.01, momentum_warmup=0.1, warmup_iters=5); an iteration is 1 at the first update.
    profile = Schedule("linear", first_decay=0.9, last_decay=0.99, num_steps=5)
    assert 1 - profile.decay(iteration) == pytest.approx(momentum, rel=1e-13)


def test_linear_of_one_step() -> None:
    profile = Schedule("linear", first_decay=0.9, last_decay=0.99, num_steps=1)
    assert [profile.decay(step) for step in (1, 2)] == [0.9, pytest.approx(0.99)]


@pytest.mark.parametrize("eta", [0, 1, 3, 8])
def test_polynomial_is_the_formula_of_shamir_and_zhang(eta: int) -> None:
    profile = Schedule("polynomial", eta=eta)
    for step in (1, 2, 3, 1000):
        assert profile.weight(step - 1, step) == pytest.approx((eta + 1) / (step + eta), rel=1e-12)
    # Its mass is Gamma(t + eta + 1) / Gamma(t).
    with mpmath.workdps(50):
        mass = mpmath.gammaprod([1000 + eta + 1, 10], [1000, 10 + eta + 1])
        assert profile.growth(10, 1000) == pytest.approx(float(mpmath.log(mass)), rel=1e-12)


def test_polynomial_with_eta_1_weighs_linearly() -> None:
    shares = Schedule("polynomial", eta=1).weights(range(1, 11))
    assert shares == pytest.approx([2 * step / (10 * 11) for step in range(1, 11)], rel=1e-13)


@pytest.mark.parametrize("steps", [0, 1, 100, 10**6])
def test_mmengine_is_the_formula_of_mmengine(steps: int) -> None:
    # MomentumAnnealingEMA counts 0 at the first update, when it copies.
    momentum = max(0.0002, 100 / (100 + steps))
    assert 1 - Schedule("mmengine").decay(steps + 1) == pytest.approx(momentum, rel=1e-12)


@pytest.mark.parametrize("step", [1, 10, 1000, 10**6])
def test_half_life_ramp_is_the_formula_of_edm2(step: int) -> None:
    # In images, at a constant batch size; EDM2 counts the images of the step before it updates.
    batch_size, half_life_in_images = 2048, 500_000
    expected = 0.5 ** (batch_size / min(half_life_in_images, 0.09 * step * batch_size))
    profile = Schedule("half-life-ramp", half_life=half_life_in_images / batch_size)
    assert profile.decay(step) == pytest.approx(expected, rel=1e-14)


def test_growth_is_the_sum_over_steps() -> None:
    profile = Schedule("tensorflow", decay=0.9)
    assert profile.growth(2, 4) == pytest.approx(-math.log(4 / 13) - math.log(5 / 14), rel=1e-15)
    assert profile.growth(2.0, 4.0) == profile.growth(2, 4)
    assert Schedule("polynomial").growth(0, 5) == math.inf


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.9999999])
def test_growth_is_exact_for_a_decay(decay: float) -> None:
    profile = Schedule("tensorflow", decay=decay)
    now = 10**12
    with mpmath.workdps(50):
        expected = -mpmath.log(mpmath.mpf(decay))
        assert abs(profile.growth(now - 1, now) - expected) <= 1e-15 * expected
        assert abs(profile.weight(now - 1, now) - (1 - mpmath.mpf(decay))) <= 1e-12 * (1 - mpmath.mpf(decay))


@pytest.mark.parametrize(("previous", "now"), [(0, 1.5), (0.5, 1)])
def test_times_are_whole_steps(previous: float, now: float) -> None:
    message = f"previous={previous} and now={now} must be whole numbers: .* use Power, Exponential or Uniform"
    with pytest.raises(ValueError, match=message):
        Schedule("tensorflow").growth(previous, now)


class CountingDecay:
    """A decay that counts how often it is asked for."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.num_calls = 0

    def __call__(self, step: int) -> float:
        self.num_calls += 1
        return self.decay


def test_only_the_steps_that_matter_are_computed() -> None:
    counting = register_schedule("counting-for-tests")(CountingDecay(0.5))
    profile = Schedule("counting-for-tests")

    def num_calls(ask: Any, *times: int) -> int:
        before = counting.num_calls
        ask(*times)
        return counting.num_calls - before

    assert num_calls(profile.growth, 10**9 - 1, 10**9) == 1
    assert num_calls(profile.initial_weight, 10**9) < 1100
    assert num_calls(profile.mean_age, 10**9) < 110
    assert num_calls(profile.half_life, 10**9) <= 2


def test_a_function_of_ones_own() -> None:
    @register_schedule("warm-for-tests")
    def warm(step: int, *, decay: float = 0.9, mode: str = "late") -> float:
        return decay if mode == "late" else 0.0

    assert warm(1) == 0.9
    profile = Schedule("warm-for-tests", decay=0.5)
    assert profile.arguments == {"decay": 0.5, "mode": "late"}
    assert profile.decay(3) == 0.5
    assert register_schedule("warm-for-tests")(warm) is warm


def test_the_arguments_are_not_changed_from_outside() -> None:
    profile = Schedule("tensorflow")
    profile.arguments["decay"] = 0.1
    assert profile.arguments == {"decay": 0.999}


def test_a_name_belongs_to_one_function() -> None:
    with pytest.raises(ValueError, match=r"schedule 'cosine' is already another function, .*: choose a free name"):
        register_schedule("cosine")(lambda step: 0.9)


def test_unknown_names_list_the_known_ones() -> None:
    message = r"no schedule is called 'exponential'; register it with @register_schedule, or use one of .*'cosine'"
    with pytest.raises(ValueError, match=message):
        Schedule("exponential")


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_a_decay_outside_its_range(value: float) -> None:
    name = f"wrong-{value}-for-tests"
    register_schedule(name)(lambda step: value if step == 7 else 0.5)
    profile = Schedule(name)
    assert profile.growth(0, 6) > 0
    with pytest.raises(ValueError, match=rf"Schedule\('{name}'\) gives {value} at step 7: a decay lies in \[0, 1\]"):
        profile.growth(6, 7)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("tensorflow", {"decay": 2000}, ValueError, r"decay=2000 is outside \[0, 1\]; a length in steps"),
        ("inverse-gamma", {"min_decay": -1}, ValueError, r"min_decay=-1 is outside \[0, 1\]"),
        ("cosine", {"base": 3, "num_steps": 5}, ValueError, r"base=3, num_steps=5\) gives 3.0 at step 1"),
        ("cosine", {"num_steps": 0}, ValueError, r"cannot be computed at step 1: .*division"),
        ("ultralytics", {"tau": -5}, ValueError, r"tau=-5\) gives -0.22.* at step 1"),
        ("cosine", {}, TypeError, "missing 1 required keyword-only argument: 'num_steps'"),
        ("cosine", {"num_step": 5}, TypeError, "unexpected keyword argument 'num_step'"),
        ("tensorflow", {"decay": "0.9"}, TypeError, "decay='0.9' must be a number, not str"),
        ("cosine", {"num_steps": [5]}, TypeError, r"num_steps=\[5\] must be a number, a string or None, to be saved"),
    ],
)
def test_impossible_arguments(name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule(name, **arguments)
