"""Restart is invisible: train N, save, load, train M is N + M, bit for bit; anything else raises and writes nothing."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import polyak
import zoo
from data import make_state

DATA = Path(__file__).parents[1] / "data"
PROFILES = {
    "power": polyak.Power(relative_std=0.1),
    "debiased": polyak.Exponential(half_life=3, debias=True),
    "uniform": polyak.Uniform(),
}
OPTIONS = [{}, {"every": 3}, {"start": 4}, {"every": 2, "start": 3}, {"dtype": torch.float64}]

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def drifting(name, seed=0):
    """A model and a function that moves it by the same steps each time."""
    torch.manual_seed(seed)
    model = zoo.MODELS[name]()
    generator = torch.Generator().manual_seed(seed)
    return model, lambda: zoo.drift(model, generator)


@pytest.mark.protects
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["batchnorm", "tied transformer", "mixed"])
def test_resume_at_every_step_is_bit_equal(name, options):
    num_steps = 9
    model, step = drifting(name)
    straight = polyak.WeightAverage(model, PROFILES, **options)
    saved = []
    for _ in range(num_steps):
        saved.append((zoo.clone(model.state_dict()), through_a_file(straight.state_dict())))
        step()
        straight.update()
    for stop, (weights, state) in enumerate(saved):
        model, step = drifting(name)
        for _ in range(stop):
            step()
        # The average is made of other weights than those that it goes on from.
        resumed = polyak.WeightAverage(model, PROFILES, **options)
        model.load_state_dict(weights)
        resumed.load_state_dict(state)
        for _ in range(num_steps - stop):
            step()
            resumed.update()
        assert resumed.time == straight.time
        for key in PROFILES:
            assert zoo.bit_equal(resumed[key].weights(), straight[key].weights()), (stop, key)


@pytest.mark.protects
def test_a_state_made_wrapped_loads_bare_and_back():
    model = zoo.batchnorm()
    wrapped = polyak.WeightAverage(nn.DataParallel(model))
    zoo.drift(model)
    wrapped.update()
    bare = polyak.WeightAverage(zoo.batchnorm())
    bare.load_state_dict(wrapped.state_dict())
    assert zoo.bit_equal(bare.weights(), wrapped.weights())
    compiled = polyak.WeightAverage(torch.compile(zoo.batchnorm()))
    compiled.load_state_dict(bare.state_dict())
    assert zoo.bit_equal(compiled.weights(), wrapped.weights())


@pytest.mark.protects
def test_any_alias_is_accepted():
    average = polyak.WeightAverage(zoo.TiedTransformer())
    state = through_a_file(average.state_dict())
    for tensors in state["averages"].values():
        tensors["average"]["head.weight"] = tensors["average"].pop("embedding.weight")
    other = polyak.WeightAverage(zoo.TiedTransformer())
    other.load_state_dict(state)
    assert zoo.bit_equal(other.weights(), average.weights())


def test_tensors_of_a_state_are_the_averages_themselves():
    average = polyak.WeightAverage(zoo.mlp())
    addresses = [
        t.data_ptr() for tensors in average.state_dict()["averages"].values() for t in tensors["average"].values()
    ]
    average.load_state_dict(copy.deepcopy(average.state_dict()))
    again = [t.data_ptr() for tensors in average.state_dict()["averages"].values() for t in tensors["average"].values()]
    assert addresses == again


@pytest.mark.protects
@pytest.mark.parametrize("tied_here", [True, False])
def test_a_state_with_other_ties_is_refused(tied_here):
    def make(tied):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if tied:
            model[1].weight = model[0].weight
        return polyak.WeightAverage(model)

    average, state = make(tied_here), make(not tied_here).state_dict()
    before = average.weights()
    with pytest.raises(polyak.MismatchError, match=r"tie '0.weight' differently|'1.weight' was tied|Only the"):
        average.load_state_dict(state)
    assert zoo.bit_equal(average.weights(), before)


class TestRefused:
    """Each error says what differs, and leaves the average as it was."""

    def refused(self, average, state, error, message):
        before, report = average.weights(), str(average.report())
        with pytest.raises(error, match=message):
            average.load_state_dict(state)
        assert zoo.bit_equal(average.weights(), before)
        assert str(average.report()) == report

    @pytest.mark.protects
    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"profile": polyak.Exponential(0.9)}, r"profiles was .*'decay': 0.9.* and is .*'relative_std': 0.1"),
            ({"every": 2}, "every was 2 and is 1"),
            ({"start": 5.0}, "start was 5.0 and is 0.0"),
            ({"dtype": torch.float64}, r"dtypes was \['float64'\] and is \['float32'\]"),
            ({"profile": {"long": polyak.Power()}}, "profiles was {'long'"),
        ],
    )
    def test_another_configuration(self, other, message):
        model = zoo.mlp()
        state = polyak.WeightAverage(model, **other).state_dict()
        self.refused(polyak.WeightAverage(model), state, polyak.StateError, message)

    @pytest.mark.protects
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: nn.Sequential(nn.Linear(6, 5)), "Only the model: '2.weight', '2.bias'"),
            (
                lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)),
                r"'2.weight' in the average 'average' of the state is \(1, 5\) torch.float32, and \(3, 5\)",
            ),
            (zoo.batchnorm, "Only the state: '1.weight'"),
        ],
    )
    def test_another_model(self, make, message):
        state = polyak.WeightAverage(make()).state_dict()
        self.refused(polyak.WeightAverage(zoo.mlp()), state, polyak.MismatchError, message)

    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            (lambda s: [1], "a state is a dictionary, as state_dict"),
            (lambda s: zoo.mlp().state_dict(), "this is no state of a WeightAverage; its keys are '0.weight'"),
            (lambda s: {**s, "version": 99}, "the state has version 99; this polyak reads version 1"),
            (lambda s: {key: value for key, value in s.items() if key != "clock"}, "it has no 'clock'"),
            (lambda s: {**s, "clock": {**s["clock"], "num_calls": "many"}}, "the state is damaged"),
            (lambda s: {**s, "clock": {"time": 1.0, "speed": 2}}, "the state is damaged: its clock is"),
            (lambda s: {**s, "clock": torch.zeros(5)}, "the state is damaged: its clock is"),
            (lambda s: {**s, "clock": {**s["clock"], "time": float("nan")}}, "the state is damaged"),
            (lambda s: {**s, "pending": {}}, "the state is damaged: KeyError"),
            (lambda s: {**s, "pending": {"average": -1.0}}, "the state is damaged: its pending growth is"),
            (lambda s: {**s, "averages": {}}, "the state is damaged: KeyError"),
            (lambda s: {**s, "averages": {k: {"average": [1]} for k in s["averages"]}}, "the state is damaged"),
            (
                lambda s: {
                    **s,
                    "averages": {k: {"average": dict.fromkeys(v["average"], 1)} for k, v in s["averages"].items()},
                },
                "the state is damaged",
            ),
        ],
    )
    def test_no_state_or_a_damaged_one(self, break_it, message):
        average = polyak.WeightAverage(zoo.mlp())
        self.refused(average, break_it(average.state_dict()), polyak.FileFormatError, message)


@pytest.mark.protects
@pytest.mark.parametrize("path", sorted(DATA.glob("state-*.pt")), ids=lambda path: path.stem)
def test_a_state_of_each_released_version_goes_on(path):
    model, straight_model = make_state.make_model(), make_state.make_model()
    average, straight = make_state.make_average(model), make_state.make_average(straight_model)
    make_state.train(straight_model, straight, range(1, 12))
    average.load_state_dict(torch.load(path, weights_only=True))
    make_state.train(model, average, range(8, 12))
    for name in average.profiles:
        assert zoo.bit_equal(average[name].weights(), straight[name].weights())


def test_there_is_a_state_of_this_version():
    assert (DATA / f"state-{polyak.__version__}.pt").exists()


@pytest.mark.protects
@pytest.mark.parametrize("change", [lambda t: t.to("meta"), lambda t: t.to_sparse()])
def test_a_tensor_without_memory_of_its_own_is_refused_before_anything_is_written(change):
    average = polyak.WeightAverage(zoo.mlp())
    average.update()
    state = average.state_dict()
    ((fingerprint, kept),) = state["averages"].items()
    state["averages"] = {fingerprint: {"average": {**kept["average"], "2.bias": change(kept["average"]["2.bias"])}}}
    other = polyak.WeightAverage(zoo.mlp())
    other.update()
    before = other.weights()
    with pytest.raises(
        polyak.FileFormatError, match=r"'2.bias' in the average 'average' of the state is no plain tensor"
    ):
        other.load_state_dict(state)
    assert zoo.bit_equal(other.weights(), before)


@pytest.mark.parametrize("part", [{"configuration": None}, {"clock": {"every": 0}}])
def test_damaged_configurations(part):
    average = polyak.WeightAverage(zoo.mlp())
    average.update()
    with pytest.raises(polyak.FileFormatError, match=r"the state is damaged"):
        average.load_state_dict({**average.state_dict(), **part})
