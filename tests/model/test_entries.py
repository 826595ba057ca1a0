"""Which tensors a model has, under which names, and what is done with each."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import polyak
import zoo
from polyak.model.entries import resolve
from polyak.model.walk import unwrap
from polyak.names import match

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


def actions(model, rules=None):
    return {entry.name: entry.action for entry in resolve(model, rules or {})}


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "checkpointed": checkpoint_wrapper,
    "inner layers wrapped": lambda model: nn.Sequential(*[checkpoint_wrapper(layer) for layer in model]),
    "inner layers compiled": lambda model: nn.Sequential(*[torch.compile(layer) for layer in model]),
    "inner layers data parallel": lambda model: nn.Sequential(*[nn.DataParallel(layer) for layer in model]),
}


@pytest.mark.protects
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_leave_no_trace_in_names(wrap):
    model = zoo.batchnorm()
    assert actions(wrap(model)) == actions(model)
    assert [entry.name for entry in resolve(model, {})] == list(model.state_dict())


def test_fabric_leaves_no_trace_in_names():
    wrappers = pytest.importorskip("lightning.fabric.wrappers")
    model = zoo.batchnorm()
    for forward in (model, nn.DataParallel(model)):
        wrapped = wrappers._FabricModule(forward, strategy=None, original_module=model)
        assert actions(wrapped) == actions(model)
        wrapped.load_state_dict(polyak.WeightAverage(wrapped).weights())


class PassesOn(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


class HoldsOnly(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.protects
@pytest.mark.parametrize("wrap", [PassesOn, HoldsOnly])
def test_wrappers_of_ones_own_leave_no_trace_either(wrap):
    model = zoo.batchnorm()
    assert list(actions(wrap(model))) == list(model.state_dict())
    assert unwrap(wrap(wrap(model))) is model


def test_a_part_that_is_called_module_keeps_its_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.head = nn.Linear(2, 2)

    model = Model()
    assert list(actions(model)) == list(model.state_dict())
    assert unwrap(model) is model
    polyak.WeightAverage(model).copy_to(nn.DataParallel(Model()))


def test_tied_tensors_are_one_entry():
    model = zoo.TiedTransformer()
    (entry,) = [entry for entry in resolve(model, {}) if entry.aliases]
    assert (entry.name, entry.aliases) == ("embedding.weight", ("head.weight",))


def test_one_storage_under_two_parameters_is_a_tie():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert resolve(model, {})[0].aliases == ("1.weight",)


@pytest.mark.protects
def test_partial_views_raise():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 2, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data[:2])
    with pytest.raises(polyak.MismatchError, match=r"'0.weight' \(4, 3\) and '1.weight' \(2, 3\) share memory"):
        polyak.WeightAverage(model)


def test_neighbours_in_one_storage_are_no_tie():
    flat = torch.randn(10)
    model = nn.Module()
    model.one, model.two = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    assert actions(model) == {"one": "average", "two": "average"}


class TestDefaults:
    @pytest.mark.protects
    def test_buffers(self):
        assert actions(zoo.Buffers()) == {
            "weight": "average",
            "table": "copy",
            "mask": "copy",
            "running": "average",
            "cache": "copy",
            "scalar": "copy",
        }

    def test_frozen_parameters_are_skipped(self):
        model = zoo.mlp()
        model[0].requires_grad_(False)
        assert actions(model) == {"0.weight": "skip", "0.bias": "skip", "2.weight": "average", "2.bias": "average"}

    @pytest.mark.protects
    @pytest.mark.parametrize(
        "normalise", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm], ids=["old", "new"]
    )
    @pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
    def test_vectors_of_a_spectral_norm_are_copied_and_it_stays_one(self, normalise):
        torch.manual_seed(0)
        model = nn.Sequential(normalise(nn.Linear(8, 8, bias=False)))
        assert sorted(actions(model).values()) == ["average", "copy", "copy"]
        average = polyak.WeightAverage(model, polyak.Exponential(0.99))
        weight = next(model.parameters())
        for _ in range(300):
            with torch.no_grad():
                weight.add_(torch.randn_like(weight), alpha=0.02)
            model(torch.randn(2, 8))
            average.update()
        with average.swapped(), torch.no_grad():
            norm = torch.linalg.matrix_norm(model(torch.eye(8)), 2)
        assert abs(norm - 1) < 0.02


class TestRules:
    def test_first_match_wins(self):
        rules = {"0.*": "copy", "*.bias": "skip", nn.Linear: "average"}
        assert actions(zoo.mlp(), rules) == {
            "0.weight": "copy",
            "0.bias": "copy",
            "2.weight": "average",
            "2.bias": "skip",
        }

    def test_by_class_and_by_function(self):
        found = actions(zoo.batchnorm(), {nn.BatchNorm2d: "copy", lambda name, tensor: tensor.dim() == 2: "skip"})
        assert [name for name, action in found.items() if action == "copy"] == [
            "1.weight",
            "1.bias",
            "1.running_mean",
            "1.running_var",
            "1.num_batches_tracked",
        ]
        assert found["4.weight"] == "skip"

    def test_a_skipped_entry_is_the_sources(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Uniform(), rules={"0.*": "skip", "2.bias": "copy"})
        zoo.drift(model)
        average.update()
        zoo.drift(model)
        weights = average.weights()
        assert torch.equal(weights["0.weight"], model[0].weight)
        assert not torch.equal(weights["2.bias"], model[2].bias)

    @pytest.mark.parametrize(
        ("rules", "error", "message"),
        [
            ({"*": "mean"}, ValueError, r"'\*' is to 'mean'; the actions are average, copy, skip"),
            ({3: "copy"}, TypeError, "3 is neither a name pattern, nor a module class, nor a function"),
            ({int: "copy"}, TypeError, "<class 'int'> is neither"),
        ],
    )
    def test_impossible_rules(self, rules, error, message):
        with pytest.raises(error, match=message):
            polyak.WeightAverage(zoo.mlp(), rules=rules)

    def test_a_pattern_that_matches_nothing_warns(self):
        with pytest.warns(UserWarning, match=r"rules: no tensor of the model is called '\*.expert_bias'"):
            polyak.WeightAverage(zoo.mlp(), rules={"*.expert_bias": "average"})


def _partitioned(values, **marks):
    """A layer whose weight is as DeepSpeed leaves it."""
    model = nn.Linear(2, 2)
    model.weight.data = values
    vars(model.weight).update(marks)
    return model


class TestWhatCannotBeAveraged:
    @pytest.mark.protects
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: zoo.mlp().requires_grad_(False), "nothing to average: Sequential has 4 tensors, 4 of them frozen"),
            (lambda: nn.Linear(2, 2, device="meta"), "'weight' is on the meta device"),
            (lambda: nn.LazyLinear(2), "'weight' is not initialised yet; run a forward pass"),
            (lambda: _partitioned(torch.empty(0)), r"'weight' is a parameter of 0 elements \(shape \(0,\)\)"),
            (lambda: _partitioned(torch.ones(2, 2), ds_id=3), "'weight' is a parameter of 4 elements .* ZeRO-3 leaves"),
        ],
    )
    def test_raises_by_name(self, make, message):
        with pytest.raises(polyak.StateError, match=message):
            polyak.WeightAverage(make())

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_parameters_that_are_empty_by_nature_are_averaged(self):
        model = nn.Linear(0, 2)
        average = polyak.WeightAverage(model)
        average.update()
        with average.swapped():
            pass
        assert average.weights()["weight"].shape == (2, 0)

    @pytest.mark.protects
    def test_unknown_dtypes_raise_by_name_and_may_be_copied(self):
        model = zoo.mlp()
        model.register_buffer("scale", torch.ones(3).to(torch.float8_e4m3fn))
        with pytest.raises(polyak.StateError, match=r"'scale' cannot be averaged: .*float8_e4m3fn.* 'copy'"):
            polyak.WeightAverage(model)
        polyak.WeightAverage(model, rules={"scale": "copy"}).update()

    def test_no_module(self):
        with pytest.raises(TypeError, match=r"model: a torch.nn.Module is needed, not OrderedDict"):
            polyak.WeightAverage(zoo.mlp().state_dict())


@pytest.mark.protects
@pytest.mark.parametrize(
    ("saved", "expected", "found"),
    [
        (["a", "b.c"], ["a", "b.c"], ["a", "b.c"]),
        (["module.a", "module.b.c"], ["a", "b.c"], ["a", "b.c"]),
        (["a", "b.c"], ["module.a", "module.b.c"], ["module.a", "module.b.c"]),
        (["_orig_mod.module.a"], ["a"], ["a"]),
        (["module._orig_mod.a"], ["a"], ["a"]),
        (["module.a", "head.b"], ["module.a", "head.b"], ["module.a", "head.b"]),
    ],
)
def test_saved_names_are_matched(saved, expected, found):
    assert list(match(dict.fromkeys(saved), expected)) == found
