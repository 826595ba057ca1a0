"""Averages with a second term, and averages in 16 bits that are rounded stochastically."""

import copy
import pickle

import pytest
import torch

import polyak
import zoo
from polyak.kernels import native
from reference.recursion import Recursion, debiased_mass, exponential_mass, widen

DECAY = 0.9
MODES = {
    "float64": {"dtype": torch.float64},
    "compensated": {"compensated": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "seed": 3},
}
ROUNDING = {"float64": 3e-15, "compensated": 1e-7, "bfloat16": 2e-2, "float16": 2.5e-3}
each_mode = pytest.mark.parametrize("mode", MODES)


def made(model, mode, profile=None):
    return polyak.WeightAverage(model, profile or polyak.Exponential(DECAY), **MODES[mode])


def seconds_of(average):
    return {f"{p}/{name}": t for p, kept in average._core.store.seconds.items() for name, t in kept.items()}


@each_mode
@pytest.mark.parametrize("model", zoo.MODELS)
def test_every_model_against_float64(model, mode):
    torch.manual_seed(0)
    model = zoo.MODELS[model]()
    average = made(model, mode)
    sources = {entry.name: entry.action for entry in average.report().entries}
    tensors = {name: t for name, t in zoo_tensors(model).items() if sources[name] == "average"}
    reference = Recursion(tensors, exponential_mass(DECAY))
    for now in range(1, 6):
        zoo.drift(model)
        average.update()
        reference.update(tensors, now)
    weights = average.weights()
    for name, expected in reference.average.items():
        error = (widen(weights[name]) - expected).abs().max()
        coarse = 1e-6 if tensors[name].is_complex() and mode != "float64" else ROUNDING[mode]
        assert error <= coarse * expected.abs().max(), name
        assert weights[name].dtype == expected_dtype(tensors[name], mode), name


def zoo_tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def expected_dtype(tensor, mode):
    wide = mode == "float64" or (mode == "compensated" and tensor.dtype in (torch.float64, torch.complex128))
    if tensor.is_complex():
        return torch.complex128 if wide else torch.complex64
    return torch.float64 if wide else MODES[mode].get("dtype", torch.float32)


@each_mode
@pytest.mark.protects
def test_restart_is_invisible(mode):
    profiles = {"a": polyak.Exponential(DECAY), "b": polyak.Power(relative_std=0.1)}

    def run(restart_at):
        torch.manual_seed(0)
        model = zoo.batchnorm()
        average = made(model, mode, profiles)
        for step in range(8):
            zoo.drift(model, torch.Generator().manual_seed(step))
            average.update()
            if step == restart_at:
                state = pickle.loads(pickle.dumps(average.state_dict()))
                model = copy.deepcopy(model)
                average = made(model, mode, profiles)
                average.load_state_dict(state)
        return {f"{p}/{name}": t for p in "ab" for name, t in average[p].weights().items()} | seconds_of(average)

    assert zoo.bit_equal(run(None), run(3))


@each_mode
def test_swap_is_bit_exact_both_ways(mode):
    model = zoo.batchnorm()
    average = made(model, mode)
    for _ in range(3):
        zoo.drift(model)
        average.update()
    raw, weights, seconds = zoo.clone(zoo_tensors(model)), average.weights(), zoo.clone(seconds_of(average))
    with average.swapped():
        assert torch.equal(model[0].weight, weights["0.weight"].float())
    assert zoo.bit_equal(zoo_tensors(model), raw)
    assert zoo.bit_equal(average.weights(), weights)
    assert zoo.bit_equal(seconds_of(average), seconds)


@each_mode
def test_several_averages_are_what_each_would_be_alone(mode):
    profiles = {"a": polyak.Exponential(0.9), "b": polyak.Exponential(0.99), "c": polyak.Uniform()}
    model = zoo.mlp()
    together, alone = made(model, mode, profiles), {name: made(model, mode, p) for name, p in profiles.items()}
    for _ in range(4):
        zoo.drift(model)
        for average in (together, *alone.values()):
            average.update()
    for name, average in alone.items():
        assert zoo.bit_equal(together[name].weights(), average.weights())


@each_mode
def test_copies_and_changed_models_keep_everything(mode):
    model = zoo.mlp()
    average = made(model, mode)
    for _ in range(3):
        zoo.drift(model)
        average.update()
    twin = copy.deepcopy({"model": model, "average": average})
    model.append(torch.nn.Linear(3, 2))
    average.adapt()
    for each in (model, twin["model"]):
        zoo.drift(each, torch.Generator().manual_seed(1))
    average.update(), twin["average"].update()
    kept = {name: tensor for name, tensor in average.weights().items() if not name.startswith("3.")}
    assert zoo.bit_equal(kept, twin["average"].weights())


class TestCompensated:
    def test_follows_where_float32_stops(self):
        """A constant step towards a source that stays: float32 stops on the way, the sum of two does not."""
        decay, num_updates = 0.999999, 20_000
        model = torch.nn.Linear(1, 64, bias=False)
        torch.nn.init.uniform_(model.weight, 0.5, 1.5)
        average = polyak.WeightAverage(model, polyak.Exponential(decay), compensated=True)
        plain = polyak.WeightAverage(model, polyak.Exponential(decay))
        first = widen(model.weight)
        with torch.no_grad():
            model.weight.mul_(1.01)
        for _ in range(num_updates):
            average.update(), plain.update()
        expected = widen(model.weight) + (first - widen(model.weight)) * decay**num_updates
        assert relative_error(average, expected) < 4e-8
        assert relative_error(plain, expected) > 1e-4

    def test_an_average_that_is_its_source_stays(self):
        model = zoo.mlp()
        average = made(model, "compensated")
        before = zoo.clone(dict(model.named_parameters()))
        for _ in range(5):
            average.update()
        assert zoo.bit_equal(average.weights(), before)
        assert not any(tensor.any() for tensor in seconds_of(average).values())

    def test_moves_where_only_the_second_term_does(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Exponential(0.9999999), compensated=True)
        zoo.drift(model)
        average.update()
        assert average.report().stuck == ()

    def test_takes_2_bytes_a_number(self):
        model = zoo.mlp()
        num_elements = sum(parameter.numel() for parameter in model.parameters())
        assert made(model, "compensated").report().num_bytes == 6 * num_elements

    @pytest.mark.parametrize("one", [True, False])
    def test_another_mode_does_not_go_on(self, one):
        average, other = (polyak.WeightAverage(zoo.mlp(), compensated=mode) for mode in (one, not one))
        average.update()
        message = "compensated was True and is not set" if one else "compensated was not set and is True"
        with pytest.raises(polyak.StateError, match=message):
            other.load_state_dict(average.state_dict())


class TestStochastic:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("decay", "num_updates", "target"),
        [(0.99, 100, 1.01), (0.9999, 300, 1.01), (0.999999, 1000, 1.01), (0.9999, 300, 0.9999), (0.9999, 300, 0.99)],
    )
    @pytest.mark.protects
    def test_is_right_in_the_mean(self, dtype, decay, num_updates, target):
        """Within 3 standard errors of what float64 gives, also where float32 would not move, and on both sides of 1."""
        model = torch.nn.Linear(1, 100_000, bias=False)
        torch.nn.init.constant_(model.weight, 1.0)
        average = polyak.WeightAverage(model, polyak.Exponential(decay), dtype=dtype)
        torch.nn.init.constant_(model.weight, target)
        for _ in range(num_updates):
            average.update()
        gap = float(torch.tensor(target)) - 1
        found = widen(average.weights()["weight"]) - 1
        expected = gap * (1 - decay**num_updates)
        standard_error = float(found.std()) / found.numel() ** 0.5
        assert abs(float(found.mean()) - expected) < 3 * standard_error
        assert standard_error > 0

    def test_the_gap_is_closed_as_in_exact_arithmetic(self):
        model = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.constant_(model.weight, 1.0)
        average = polyak.WeightAverage(model, polyak.Exponential(0.999), dtype=torch.bfloat16)
        torch.nn.init.constant_(model.weight, 2.0)
        for _ in range(2000):
            average.update()
        assert float(average.weights()["weight"].double().mean()) - 1 == pytest.approx(1 - 0.999**2000, abs=2e-3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_what_is_finite_stays_so(self, dtype):
        model = torch.nn.Linear(1, 200, bias=False)
        largest = torch.finfo(dtype).max
        torch.nn.init.constant_(model.weight, 1.0001 * largest if dtype == torch.float16 else -3.4e38)
        average = polyak.WeightAverage(model, polyak.Exponential(0.9), dtype=dtype)
        for _ in range(3):
            average.update()
        assert average.weights()["weight"].abs().eq(largest).all()

    def test_leaves_the_generator_alone(self):
        model = zoo.mlp()
        average = made(model, "bfloat16")
        before = torch.get_rng_state()
        average.update()
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_seed_decides_and_nothing_else_does(self):
        def run(seed, model):
            average = polyak.WeightAverage(model, polyak.Exponential(0.99), dtype=torch.bfloat16, seed=seed)
            average.update()
            return average.weights()

        torch.manual_seed(0)
        model = zoo.mlp()
        assert zoo.bit_equal(run(1, model), run(1, torch.nn.DataParallel(copy.deepcopy(model))))
        assert not zoo.bit_equal(run(1, model), run(2, model))

    @pytest.mark.skipif(native.library() is None, reason="installed without a compiler")
    def test_is_the_same_in_every_kernel(self, monkeypatch):
        start = zoo.batchnorm().to(memory_format=torch.channels_last)
        found = []
        for kernel in ("native", "staged"):
            monkeypatch.setenv("POLYAK_KERNELS", kernel)
            model = copy.deepcopy(start)
            average = made(model, "bfloat16")
            for step in range(3):
                zoo.drift(model, torch.Generator().manual_seed(step))
                average.update()
            assert str(average.plan).startswith(kernel)
            found.append(average.weights())
        assert zoo.bit_equal(*found)

    def test_an_average_that_is_its_source_stays(self):
        model = zoo.mlp().bfloat16()
        average = made(model, "bfloat16")
        before = zoo.clone(dict(model.named_parameters()))
        for _ in range(5):
            average.update()
        assert zoo.bit_equal(average.weights(), before)

    def test_another_seed_does_not_go_on(self):
        average, other = (polyak.WeightAverage(zoo.mlp(), dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
        average.update()
        with pytest.raises(polyak.StateError, match=r"seed was 0 and is 1"):
            other.load_state_dict(average.state_dict())

    def test_the_state_of_another_draw_is_refused_and_its_weights_can_be_read(self, tmp_path):
        average, other = (polyak.WeightAverage(zoo.mlp(), dtype=torch.bfloat16, seed=5) for _ in range(2))
        average.update()
        state = average.state_dict()
        # Of the first versions, which had no number for the draw.
        configuration = {key: value for key, value in state["configuration"].items() if key != "draw"}
        kept = {key: {"6c18270f658660f1": next(iter(state[key].values()))} for key in ("averages", "copies")}
        torch.save({**state, **kept, "configuration": configuration}, tmp_path / "state.pt")
        before = other.weights()
        with pytest.raises(polyak.StateError, match=r"drew other random bits .*draw 1, here 2.*polyak.read"):
            other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert zoo.bit_equal(other.weights(), before)
        assert zoo.bit_equal(polyak.read(tmp_path / "state.pt").weights(), average.weights())


@pytest.mark.filterwarnings("ignore:the average is saved after 0 updates")
@pytest.mark.parametrize(
    ("options", "fingerprint"),
    [
        ({}, "b9957614db4d47ad"),
        ({"compensated": True}, "9c3aaf2a766e6ec5"),
        ({"dtype": torch.float64}, "7f9924c5dbe0ffa1"),
    ],
    ids=str,
)
def test_states_of_other_modes_have_the_fingerprint_that_they_always_had(options, fingerprint):
    state = polyak.WeightAverage(torch.nn.Linear(3, 2), polyak.Exponential(0.9), **options).state_dict()
    assert list(state["averages"]) == [fingerprint]


def relative_error(average, expected):
    return float((widen(average.weights()["weight"]) - expected).norm() / expected.norm())


def test_the_debiased_profile_forgets_the_first_weights_in_every_mode():
    for options in MODES.values():
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5, debias=True), **options)
        reference = Recursion(dict(model.named_parameters()), debiased_mass(0.5))
        zoo.drift(model)
        average.update()
        reference.update(dict(model.named_parameters()), 1)
        for name, expected in reference.average.items():
            torch.testing.assert_close(widen(average.weights()[name]), expected, rtol=1e-2, atol=1e-3)
