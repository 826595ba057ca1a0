"""`WeightAverage`: what it computes, when, and what it hands out."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import polyak
import zoo
from reference import recursion
from reference.recursion import Recursion

PROFILES = {
    "power": (polyak.Power(exponent=6.94), recursion.power_mass(6.94)),
    "exponential": (polyak.Exponential(0.9), recursion.exponential_mass(0.9)),
    "debiased": (polyak.Exponential(0.9, debias=True), recursion.debiased_mass(0.9)),
    "uniform": (polyak.Uniform(), recursion.uniform_mass),
}
# float32 rounds at each update; float64 averages are held to float64.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.complex64: 5e-6}

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


def averaged(average, name):
    """The averaged tensors of one profile as the report names them."""
    entries = {entry.name for entry in average.report().entries if entry.action == "average"}
    state = average.state_dict()["averages"]
    (profiles,) = state.values()
    return {key: tensor for key, tensor in profiles[name].items() if key in entries}


def close(average, name, reference):
    for key, tensor in averaged(average, name).items():
        expected = reference.average[key]
        error = (recursion.widen(tensor) - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[tensor.dtype], (key, float(error))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_profile_follows_its_recursion_on_every_model(name):
    model = zoo.MODELS[name]()
    average = polyak.WeightAverage(model, {key: profile for key, (profile, _) in PROFILES.items()})
    names = averaged(average, "power").keys()

    def tensors():
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {key: found[key] for key in names}

    references = {key: Recursion(tensors(), mass) for key, (_, mass) in PROFILES.items()}
    for now in range(1, 31):
        zoo.drift(model)
        average.update()
        for reference in references.values():
            reference.update(tensors(), now)
    for key, reference in references.items():
        close(average, key, reference)


def test_several_averages_are_what_each_would_be_alone():
    model = zoo.batchnorm()
    together = polyak.WeightAverage(model, {key: profile for key, (profile, _) in PROFILES.items()})
    alone = {key: polyak.WeightAverage(model, profile) for key, (profile, _) in PROFILES.items()}
    for _ in range(5):
        zoo.drift(model)
        for average in (together, *alone.values()):
            average.update()
    for key, average in alone.items():
        assert zoo.bit_equal(together[key].weights(), average.weights())


def test_no_profile_is_power_of_a_tenth():
    average = polyak.WeightAverage(zoo.mlp())
    assert average.profiles == {"average": polyak.Power(relative_std=0.10)}


@pytest.mark.protects
@pytest.mark.parametrize("name", ["mlp", "tied transformer", "bfloat16", "buffers", "complex"])
def test_constant_weights_stay_what_they_are(name):
    model = zoo.MODELS[name]()
    average = polyak.WeightAverage(model, {key: profile for key, (profile, _) in PROFILES.items()})
    before = {key: average[key].weights() for key in PROFILES}
    for _ in range(10_000 if name == "mlp" else 200):
        average.update()
    for key in PROFILES:
        assert zoo.bit_equal(average[key].weights(), before[key])


class TestTime:
    def test_at_another_axis(self):
        model = zoo.mlp().double()
        average = polyak.WeightAverage(model, polyak.Power(exponent=3.0))
        reference = Recursion(dict(model.named_parameters()), recursion.power_mass(3.0))
        for images in (32, 64, 80, 1000):
            zoo.drift(model)
            average.update(at=images)
            reference.update(dict(model.named_parameters()), images)
        close(average, "average", reference)
        assert average.time == 1000

    @pytest.mark.protects
    def test_every_kth_call_has_the_growth_of_k(self):
        model = zoo.mlp().double()
        average = polyak.WeightAverage(model, polyak.Exponential(0.9), every=3)
        reference = Recursion(dict(model.named_parameters()), recursion.exponential_mass(0.9))
        for call in range(1, 11):
            zoo.drift(model)
            average.update()
            if call % 3 == 0:
                reference.update(dict(model.named_parameters()), call)
        close(average, "average", reference)
        assert (average.num_updates, average.time) == (3, 10)

    @pytest.mark.protects
    def test_until_the_start_it_is_a_copy_and_then_time_begins(self):
        model = zoo.mlp().double()
        average = polyak.WeightAverage(model, polyak.Exponential(0.9), start=3)
        for _ in range(3):
            zoo.drift(model)
            average.update()
            assert zoo.bit_equal(average.weights(), dict(model.state_dict()))
        reference = Recursion(dict(model.named_parameters()), recursion.exponential_mass(0.9))
        for now in range(1, 6):
            zoo.drift(model)
            average.update()
            reference.update(dict(model.named_parameters()), now)
        close(average, "average", reference)

    def test_axes_do_not_mix(self):
        average = polyak.WeightAverage(zoo.mlp())
        average.update(at=5)
        with pytest.raises(polyak.StateError, match=r"update\(\) and update\(at=...\) cannot be mixed"):
            average.update()
        average.update(at=6)
        assert average.num_updates == 2

    @pytest.mark.parametrize("at", [0, -1, 5, 4.9, float("inf"), float("nan")])
    def test_time_must_advance(self, at):
        average = polyak.WeightAverage(zoo.mlp())
        average.update(at=5)
        with pytest.raises(ValueError, match=rf"update\(at={at}\): time must advance, and was 5 before"):
            average.update(at=at)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every": 0}, "every=0: an update is made every 1, 2, 3"),
            ({"every": 2.0}, "every=2.0"),
            ({"start": -1}, "start=-1: the start is a finite time"),
            ({"start": float("inf")}, "start=inf"),
            ({"profile": 0.999}, r"0.999 is not a profile, .*; for a decay, polyak.Exponential\(0.999\)"),
            ({"profile": {}}, "at least one profile is needed"),
            ({"profile": {"": polyak.Uniform()}}, "'' is not a name for an average"),
            ({"dtype": torch.bfloat16, "compensated": True}, "in torch.bfloat16 rounds stochastically, and a second"),
            ({"dtype": torch.float64, "compensated": True}, "its dead zone at decay 0.9999 is 1.1e-12"),
            ({"compensated": 1}, "compensated=1: True or False"),
            ({"seed": -1}, "seed=-1: a whole number from 0"),
            ({"seed": 1.0}, "seed=1.0: a whole number from 0"),
            ({"dtype": torch.int64}, r"floating-point tensors cannot be cast to torch.int64"),
            ({"dtype": torch.float8_e5m2}, r"averages are kept in torch.float64, torch.float32, torch.bf"),
            ({"dtype": "float32"}, r"dtype='float32': a torch.dtype is needed"),
            ({"start": "x"}, r"start='x': a number is needed"),
            ({"rules": ["*.bias"]}, r"rules: a dictionary of actions is needed"),
            ({"device": "meta"}, r"device='meta': an average has values"),
            ({"nonfinite": "ignore"}, r"nonfinite='ignore': it is one of 'raise', 'skip', 'propagate'"),
        ],
    )
    def test_impossible_options(self, options, message):
        with pytest.raises((ValueError, TypeError), match=message):
            polyak.WeightAverage(zoo.mlp(), **options)


class TestDtypes:
    @pytest.mark.protects
    @pytest.mark.parametrize("name", ["bfloat16", "float16"])
    def test_float32_for_16_bits(self, name):
        weights = polyak.WeightAverage(zoo.MODELS[name]()).weights()
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    @pytest.mark.protects
    @pytest.mark.parametrize("name", ["mlp", "bfloat16", "float16"])
    def test_gap_is_closed_as_in_exact_arithmetic(self, name):
        model = zoo.MODELS[name]()
        nn.init.zeros_(model[0].weight)
        average = polyak.WeightAverage(model, polyak.Exponential(0.999))
        nn.init.ones_(model[0].weight)
        for _ in range(2000):
            average.update()
        expected = 1 - 0.999**2000
        assert average.weights()["0.weight"].sub(expected).abs().max() < 1e-5

    def test_float64_on_request(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Exponential(0.9), dtype=torch.float64)
        reference = Recursion(dict(model.named_parameters()), recursion.exponential_mass(0.9))
        for now in range(1, 20):
            zoo.drift(model)
            average.update()
            reference.update(dict(model.named_parameters()), now)
        close(average, "average", reference)

    def test_complex_in_float64_is_complex128(self):
        weights = polyak.WeightAverage(zoo.Complex(), dtype=torch.float64).weights()
        assert weights["weight"].dtype == torch.complex128


class TestWeights:
    @pytest.mark.parametrize("name", zoo.MODELS)
    def test_load_strictly_into_the_bare_model(self, name):
        model = zoo.MODELS[name]()
        average = polyak.WeightAverage(nn.DataParallel(model))
        zoo.drift(model)
        average.update()
        bare = zoo.MODELS[name]()
        bare.load_state_dict(average.weights(), strict=True)

    def test_are_copies(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Uniform())
        before = average.weights()
        kept = zoo.clone(before)
        zoo.drift(model)
        average.update()
        assert zoo.bit_equal(before, kept)

    @pytest.mark.protects
    def test_frozen_parameters_are_there_and_take_no_storage(self):
        model = zoo.mlp()
        model[0].requires_grad_(False)
        average = polyak.WeightAverage(model)
        assert average.report().num_bytes == (5 * 3 + 3) * 4
        assert torch.equal(average.weights()["0.weight"], model[0].weight)

    def test_copy_to(self):
        model, other = zoo.batchnorm(), zoo.batchnorm().bfloat16()
        average = polyak.WeightAverage(model)
        average.copy_to(nn.DataParallel(other))
        expected = {name: t.to(other.state_dict()[name].dtype) for name, t in model.state_dict().items()}
        assert zoo.bit_equal(dict(other.state_dict()), expected)

    def test_copy_to_another_kind_of_model_writes_nothing(self):
        average = polyak.WeightAverage(zoo.mlp())
        other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
        before = zoo.clone(other.state_dict())
        with pytest.raises(polyak.MismatchError, match=r"'2.weight' of the given model has the shape \(1, 5\)"):
            average.copy_to(other)
        assert zoo.bit_equal(dict(other.state_dict()), before)

    def test_which_of_several_must_be_said(self):
        average = polyak.WeightAverage(zoo.mlp(), {"short": polyak.Power(relative_std=0.05), "mean": polyak.Uniform()})
        with pytest.raises(polyak.StateError, match=r"'short', 'mean' are all kept here: .* average\['short'\]"):
            average.weights()
        with pytest.raises(KeyError, match=r"'long' is none of the averages kept here: 'short', 'mean'"):
            average["long"]
        assert average["mean"].profile == polyak.Uniform()


class TestModules:
    @pytest.mark.parametrize("name", [name for name in zoo.MODELS if name != "buffers"])
    def test_module_is_independent_and_in_the_sources_dtype(self, name):
        model = zoo.MODELS[name]()
        average = polyak.WeightAverage(model, polyak.Uniform())
        zoo.drift(model)
        average.update()
        module = average.module()
        expected = {key: t.to(model.state_dict()[key].dtype) for key, t in average.weights().items()}
        assert zoo.bit_equal(dict(module.state_dict()), expected)
        zoo.drift(model)
        average.update()
        assert zoo.bit_equal(dict(module.state_dict()), expected)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())

    def test_module_in_a_chosen_dtype(self):
        module = polyak.WeightAverage(zoo.batchnorm()).module(torch.bfloat16)
        assert module[0].weight.dtype == torch.bfloat16
        assert module[1].num_batches_tracked.dtype == torch.int64

    def test_module_of_a_wrapped_model_is_bare(self):
        assert type(polyak.WeightAverage(nn.DataParallel(zoo.mlp())).module()) is nn.Sequential

    @pytest.mark.protects
    def test_live_module_follows(self):
        model = zoo.TiedTransformer()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        teacher = average.live_module()
        tokens = torch.arange(6).view(1, 6)
        for _ in range(3):
            zoo.drift(model)
            average.update()
            with average.swapped(), torch.no_grad():
                model.eval()
                expected = model(tokens)
                assert torch.equal(teacher(tokens), expected)
        assert zoo.bit_equal(dict(teacher.state_dict()), average.weights())

    def test_live_module_must_not_be_moved(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model)
        teacher = average.live_module()
        teacher.double()
        with pytest.raises(polyak.StateError, match=r"a live Sequential no longer shares the average's storage"):
            average.update()
        del teacher
        average.update()

    @pytest.mark.protects
    def test_a_model_that_holds_its_averager(self):
        model = zoo.mlp()
        names = list(model.state_dict())
        model.average = polyak.WeightAverage(model)
        assert list(model.state_dict()) == names
        assert len(list(model.parameters())) == 4
        assert model.average.module().average is None

    def test_cached_tensors_with_a_graph(self):
        model = zoo.mlp()
        model[0].cached = model[0].weight * 2
        module = polyak.WeightAverage(model).module()
        assert module[0].cached.isnan().all()

    @pytest.mark.parametrize("kind", ["lambda", "wrapped forward", "view", "lock"])
    def test_what_would_read_the_trained_weights_raises(self, kind):
        model = zoo.mlp()
        if kind == "lambda":
            model.scale = lambda inputs: inputs @ model[0].weight
        elif kind == "wrapped forward":
            forward = model.forward
            model.forward = lambda inputs: forward(inputs) * 2
        elif kind == "view":
            model[0].transposed = model[0].weight.t()
        else:
            import threading

            model.lock = threading.Lock()
        average = polyak.WeightAverage(model)
        average.update()
        with pytest.raises(polyak.StateError, match=r"Sequential cannot be copied: .* average\.swapped\(\)"):
            average.module()
        with average.swapped():
            model[0](torch.randn(2, 6))


class TestReplacedTensors:
    """The model's tensors are resolved once; what replaces them is noticed at the next update."""

    def replace_data(self, model):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    def assign(self, model):
        model.load_state_dict(zoo.clone(model.state_dict()), assign=True)

    def new_parameter(self, model):
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())

    def cast(self, model):
        model.bfloat16()

    def new_layer(self, model):
        model[0] = copy.deepcopy(model[0])

    @pytest.mark.protects
    @pytest.mark.parametrize("how", [replace_data, assign, new_parameter, cast, new_layer])
    def test_is_followed(self, how):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        before = average.weights()
        how(self, model)
        zoo.drift(model)
        # Nothing but the update looks at the model here.
        average.update()
        expected = {name: (before[name] + t.detach().float()) / 2 for name, t in model.state_dict().items()}
        for name, tensor in average.weights().items():
            torch.testing.assert_close(tensor, expected[name])

    @pytest.mark.protects
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m.add_module("3", nn.Linear(3, 3)), r"Only the model: '3.weight', '3.bias'.*layers were added"),
            (lambda m: m.__delitem__(2), "Only the average: '2.weight', '2.bias'.*layers were added or removed"),
            (lambda m: setattr(m, "2", nn.Linear(5, 4)), r"'2.weight' of the model has the shape \(4, 5\)"),
            (lambda m: m.double(), "'0.weight' of the model is torch.float64, and was torch.float32"),
        ],
    )
    def test_another_model_raises_and_nothing_is_written(self, change, message):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Uniform())
        before = average.weights()
        zoo.drift(model)
        change(model)
        for call in (average.update, average.report, average.state_dict):
            with pytest.raises(polyak.MismatchError, match=message):
                call()
        assert (average.num_updates, average.time) == (0, 0)
        (state,) = average._core.store.averages.values()
        assert zoo.bit_equal(state, before)

    @pytest.mark.protects
    def test_a_cut_tie(self):
        model = zoo.TiedTransformer()
        average = polyak.WeightAverage(model)
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        with pytest.raises(polyak.MismatchError, match=r"'head.weight' was tied to 'embedding.weight'"):
            average.update()

    @pytest.mark.protects
    def test_a_frozen_parameter_that_is_trained(self):
        model = zoo.mlp()
        model[0].requires_grad_(False)
        average = polyak.WeightAverage(model)
        model[0].requires_grad_(True)
        with pytest.raises(polyak.StateError, match=r"'0.weight' was frozen when the average was made"):
            average.update()


def test_one_with_a_single_profile_is_an_average():
    half = polyak.Exponential(0.5)
    average = polyak.WeightAverage(zoo.mlp(), half)
    assert isinstance(average, polyak.Average)
    assert (average.name, average.profile) == ("average", half)
    assert polyak.WeightAverage.swapped is polyak.Average.swapped
    several = polyak.WeightAverage(zoo.mlp(), {"a": half, "b": polyak.Uniform()})
    for ask in (lambda: several.name, lambda: several.profile, several.weights, several.swapped, several.swap_in):
        with pytest.raises(polyak.StateError, match=r"'a', 'b' are all kept here: say which one, as average\['a'\]"):
            ask()
    several["b"].swap_in()
    with pytest.raises(polyak.StateError, match=r"swap_out\(\) of 'a': the average 'b' stands in the model"):
        several["a"].swap_out()
    several.swap_out()


def test_it_ends_with_its_last_reference():
    average = polyak.WeightAverage(zoo.mlp())
    average.update()
    ended = [weakref.ref(each) for each in (average, average._core, average._core.store)]
    gc.disable()
    try:
        del average
        assert [each() for each in ended] == [None, None, None]
    finally:
        gc.enable()
