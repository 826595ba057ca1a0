"""`lerp_`: target and teacher networks that follow their source."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import polyak
import zoo
from polyak import lerp as targets
from polyak.lerp import lerp_
from polyak.model.entries import resolve
from reference.recursion import widen


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def copies(module):
    return {name: tensor.detach().clone() for name, tensor in tensors(module).items()}


def unchanged(module, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in tensors(module).items())


def pair(name="mlp"):
    source = zoo.MODELS[name]()
    return copy.deepcopy(source), source


@pytest.mark.parametrize("weight", [0.0, 0.005, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_follows_the_formula(name, weight):
    target, source = pair(name)
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in target.parameters()):
        target.float()
    actions = {entry.name: entry.action for entry in resolve(target, {}, include_frozen=True)}
    expected = {name: widen(tensor) for name, tensor in tensors(target).items()}
    for _ in range(3):
        zoo.drift(source)
        lerp_(target, source, weight=weight)
        for key, tensor in tensors(source).items():
            share = {"average": weight, "copy": 1.0, "skip": 0.0}[actions[key]]
            expected[key] = expected[key] + share * (widen(tensor) - expected[key])
    for key, tensor in tensors(target).items():
        assert torch.allclose(widen(tensor), expected[key], rtol=1e-6, atol=1e-6), key


def test_a_target_equal_to_its_source_stays_bit_equal():
    target, source = pair("tied transformer")
    before = copies(target)
    lerp_(target, source, weight=0.3)
    assert unchanged(target, before)


def test_tied_weights_move_once():
    source = zoo.TiedTransformer()
    target = copy.deepcopy(source)
    before = target.head.weight.detach().clone()
    zoo.drift(source)
    expected = before + 0.25 * (source.head.weight.detach() - before)
    lerp_(target, source, weight=0.25)
    assert torch.allclose(target.head.weight, expected, rtol=1e-6)
    assert target.head.weight is target.embedding.weight
    state, other = target.state_dict(), source.state_dict()
    expected = expected + 0.25 * (source.head.weight.detach() - expected)
    lerp_(state, other, weight=0.25)
    assert torch.allclose(target.head.weight, expected, rtol=1e-6)


def test_frozen_targets_move_and_stay_frozen():
    target, source = pair("batchnorm")
    target.requires_grad_(False)
    zoo.drift(source)
    before = copies(target)
    lerp_(target, source, weight=0.5)
    expected = torch.lerp(before["0.weight"], source[0].weight.detach(), 0.5)
    assert torch.equal(target[0].weight, expected)
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert all(parameter.requires_grad for parameter in source.parameters())


def test_integers_are_copied_and_floating_point_buffers_averaged():
    target, source = pair("batchnorm")
    source.train()[:2](torch.randn(4, 2, 6, 6))
    before = copies(target)
    lerp_(target, source, weight=0.25)
    assert target[1].num_batches_tracked == 1
    expected = before["1.running_mean"] + 0.25 * (source[1].running_mean - before["1.running_mean"])
    assert torch.allclose(target[1].running_mean, expected)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_wrappers_are_ignored(weight):
    target, source = pair()
    expected = copy.deepcopy(target)
    zoo.drift(source)
    lerp_(expected, source, weight=weight)
    lerp_(nn.DataParallel(target), torch.compile(source, backend="eager"), weight=weight)
    assert unchanged(target, copies(expected))


def test_a_source_of_16_bits_moves_a_target_of_32():
    target, source = pair()
    source.bfloat16()
    before = copies(target)
    zoo.drift(source)
    lerp_(target, source, weight=0.005)
    for name, tensor in tensors(target).items():
        expected = torch.lerp(before[name].double(), tensors(source)[name].detach().double(), 0.005)
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_target_of_16_bits_is_refused_unless_it_is_copied(dtype):
    target, source = (module.to(dtype) for module in pair())
    zoo.drift(source)
    before = copies(target)
    with pytest.raises(ValueError, match=r"weight=0.005: the target's '0.weight', .* 16 bits.*target.float\(\)"):
        lerp_(target, source, weight=0.005)
    assert unchanged(target, before)
    lerp_(target, source, weight=1.0)
    assert unchanged(target, copies(source))


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), float("inf")])
def test_weights_outside_of_0_to_1_are_refused(weight):
    with pytest.raises(ValueError, match=f"weight={weight!r}: it is the share of the source's weights .* 0 to 1"):
        lerp_(*pair(), weight=weight)


def test_other_names_are_an_error_and_nothing_is_written():
    target, source = pair()
    source.add_module("extra", nn.Linear(3, 3))
    del target[2]
    before = copies(target)
    with pytest.raises(polyak.MismatchError) as caught:
        lerp_(target, source, weight=0.5)
    assert "the source and the target hold different tensors. Only the target: none" in str(caught.value)
    assert "Only the source: '2.weight', '2.bias', 'extra.weight', 'extra.bias'" in str(caught.value)
    assert unchanged(target, before)


def test_other_shapes_are_an_error_and_nothing_is_written():
    target, source = pair()
    source[2] = nn.Linear(1, 3)
    before = copies(target)
    message = r"'2.weight' has the shape \(3, 1\) in the source and \(3, 5\) in the target. Nothing was written"
    with pytest.raises(polyak.MismatchError, match=message):
        lerp_(target, source, weight=0.5)
    assert unchanged(target, before)


def test_other_kinds_are_an_error():
    with pytest.raises(polyak.MismatchError, match=r"'tensor 1' has the dtype torch.int64 in the source and torch.fl"):
        lerp_([torch.ones(1), torch.ones(1)], [torch.ones(1), torch.ones(1, dtype=torch.int64)], weight=0.5)


def test_a_tie_on_one_side_only_is_an_error():
    target, source = zoo.TiedTransformer(), zoo.TiedTransformer()
    source.head.weight = nn.Parameter(source.head.weight.detach().clone())
    with pytest.raises(
        polyak.MismatchError, match=r"tie 'embedding.weight' differently|Only the source: 'head.weight'"
    ):
        lerp_(target, source, weight=0.5)
    tied = torch.ones(2)
    with pytest.raises(polyak.MismatchError, match="'a' and 'b' are one tensor in the target and two in the source"):
        lerp_({"a": tied, "b": tied}, {"a": torch.zeros(2), "b": torch.zeros(2)}, weight=0.5)
    assert torch.equal(tied, torch.ones(2))


@pytest.mark.protects
def test_a_target_that_shares_memory_is_an_error():
    target, source = pair()
    target[2].weight = source[2].weight
    before = copies(target)
    message = r"'2.weight' of the (target|source) and '2.weight' of the (target|source) share memory.*copy.deepcopy"
    with pytest.raises(polyak.MismatchError, match=message):
        lerp_(target, source, weight=0.5)
    assert unchanged(target, before)
    with pytest.raises(polyak.MismatchError, match="share memory"):
        lerp_(source, source, weight=0.5)
    whole = torch.zeros(6)
    with pytest.raises(polyak.MismatchError, match="share memory"):
        lerp_([whole[:4]], [whole[2:]], weight=0.5)
    with pytest.raises(polyak.MismatchError, match="share memory"):
        lerp_([whole[:4], whole[3:]], [torch.ones(4), torch.ones(3)], weight=0.5)
    with pytest.raises(polyak.MismatchError, match=r"in one place of the target's memory, as expand\(\)"):
        lerp_([torch.zeros(1).expand(3)], [torch.ones(3)], weight=0.5)
    assert torch.equal(whole, torch.zeros(6))


def test_parts_of_one_tensor_may_follow_each_other():
    both = torch.stack([torch.zeros(3), torch.ones(3)], dim=1)
    lerp_([both[:, 0]], [both[:, 1]], weight=0.25)
    assert torch.equal(both, torch.tensor([[0.25, 1.0]] * 3))


def test_lists_and_generators_are_matched_by_position():
    target, source = pair()
    before = copies(target)
    zoo.drift(source)
    lerp_(target.parameters(), list(source.parameters()), weight=0.25)
    for name, tensor in tensors(target).items():
        assert torch.equal(tensor, torch.lerp(before[name], tensors(source)[name].detach(), 0.25))
    message = r"the target has 4 tensors, of shapes \(5, 6\), .*; the source has 3, of shapes \(5, 6\)"
    with pytest.raises(polyak.MismatchError, match=message):
        lerp_(target.parameters(), list(source.parameters())[:3], weight=0.25)


def test_dictionaries_are_matched_by_key():
    target, source = {"a": torch.zeros(2), "n": torch.tensor(1)}, {"n": torch.tensor(7), "a": torch.ones(2)}
    lerp_(target, source, weight=0.25)
    assert torch.equal(target["a"], torch.full((2,), 0.25))
    assert target["n"] == 7
    with pytest.raises(polyak.MismatchError, match=r"Only the target: 'n'. Only the source: 'm'"):
        lerp_(target, {"a": torch.ones(2), "m": torch.tensor(7)}, weight=0.25)


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (nn.Linear(1, 1), {"weight": torch.ones(1, 1)}, "two lists of tensors, not Linear and dict"),
        (torch.zeros(2), torch.ones(2), "two lists of tensors, not Tensor and Tensor"),
        ({"a"}, {"a"}, "two lists of tensors, not set and set"),
        (1, 2, "two lists of tensors, not int and int"),
        ([1.0], [torch.ones(())], "'tensor 0' of the target is a float, not a tensor"),
        ({"a": torch.ones(())}, {"a": None}, "'a' of the source is a NoneType, not a tensor"),
    ],
)
def test_what_is_no_set_of_tensors_is_refused(target, source, message):
    with pytest.raises(TypeError, match=message):
        lerp_(target, source, weight=0.5)


def test_an_average_that_stands_in_a_module_is_an_error():
    target, source = pair()
    average = polyak.WeightAverage(source)
    average.update()
    with average.swapped(), pytest.raises(polyak.StateError, match=r"lerp_\(\) inside of swapped\(\)"):
        lerp_(target, source, weight=0.5)
    lerp_(target, source, weight=0.5)


@pytest.mark.protects
def test_a_graph_that_used_the_target_notices():
    target, source = pair()
    zoo.drift(source)
    output = target(torch.randn(2, 6)).square().mean()
    lerp_(target, source, weight=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


# Pairs of modules are remembered.


def walks(monkeypatch):
    calls = []
    original = targets.resolve
    monkeypatch.setattr(targets, "resolve", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def test_modules_are_looked_through_once(monkeypatch):
    calls = walks(monkeypatch)
    target, source = pair()
    for _ in range(5):
        lerp_(target, source, weight=0.1)
    assert len(calls) == 1


def test_replaced_tensors_are_noticed(monkeypatch):
    calls = walks(monkeypatch)
    target, source = pair()
    lerp_(target, source, weight=0.1)
    source[0].weight = nn.Parameter(torch.ones(5, 6))
    target[2].weight.data = torch.zeros(3, 5)
    lerp_(target, source, weight=1.0)
    assert len(calls) == 2
    assert unchanged(target, copies(source))
    source.double()
    zoo.drift(source)
    lerp_(target, source, weight=1.0)
    assert torch.equal(target[0].weight, source[0].weight.float())
    source.add_module("extra", nn.Linear(2, 2))
    with pytest.raises(polyak.MismatchError, match="extra"):
        lerp_(target, source, weight=1.0)
    target.add_module("extra", nn.Linear(2, 2))
    lerp_(target, source, weight=1.0)
    assert torch.equal(target.extra.weight, source.extra.weight.float())


def test_tensors_without_an_address_are_left_alone(monkeypatch):
    calls = walks(monkeypatch)
    target, source = pair()
    for module in (target, source):
        module.register_buffer("graph", torch.eye(2).to_sparse())
    zoo.drift(source[0])
    for _ in range(2):
        lerp_(target, source, weight=1.0)
    assert torch.equal(target[0].weight, source[0].weight)
    assert len(calls) == 2


@pytest.mark.parametrize("which", [0, 1])
def test_nothing_is_kept_alive(which):
    modules = list(pair())
    for module in modules:
        # As hooks do, a part of the module refers to the whole.
        module[0].register_forward_hook(lambda *_, module=module: None)
    lerp_(*modules, weight=0.1)
    held = [weakref.ref(modules[which]), weakref.ref(targets._KNOWN[modules[0]][modules[1]])]
    del module, modules[which]
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_copies_of_modules_know_nothing_of_it():
    target, source = pair()
    lerp_(target, source, weight=0.1)
    twin = copy.deepcopy(target)
    zoo.drift(source)
    lerp_(twin, source, weight=1.0)
    assert not torch.equal(twin[0].weight, target[0].weight)
    assert torch.equal(twin[0].weight, source[0].weight)
