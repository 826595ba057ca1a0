"""FSDP2 over one dimension of ranks: updates, swaps and what is asked of an average, against one process."""

import copy
import operator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import polyak
import sharded_zoo
import zoo
from ranks import on
from sharded_zoo import PROFILES, Mirror, make, shard, train


@on(4)
def averages_are_those_of_one_process(folder):
    model, twin = make()
    shard(model)
    sizes = {name: p._local_tensor.numel() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    if distributed.get_rank() == 3:
        assert sizes["first.weight"] == sizes["second.bias"] == 0
    average, mirror = polyak.WeightAverage(model, PROFILES), Mirror(twin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(4):
        train(model, optimizer, seed=step)
        average.update()
        mirror.update(model)
        mirror.check(average)
    # The buffers of a rank are its own, and are averaged there.
    assert average["ema"].weights().keys() == Net_names()
    assert average.report().averages[0].name == "power"
    assert {each.shape for each in average.report().entries if each.name == "first.weight"} == {(5, 8)}
    assert zoo.bit_equal(average.raw_weights(), sharded_zoo.whole(model))


def Net_names():  # noqa: N802
    return sharded_zoo.Net().state_dict().keys()


@on(4)
def no_collective_in_updates_and_swaps(folder):
    model, _ = make()
    shard(model)
    average = polyak.WeightAverage(model, PROFILES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, seed=0)
    with CommDebugMode() as counter:
        _validate(model)
    assert counter.get_total_counts() > 0
    for prepare in (lambda: None, lambda: _validate(model)):
        prepare()
        with CommDebugMode() as counter:
            average.update()
            with average["ema"].swapped():
                pass
            average.state_dict()
            average.load_state_dict(average.state_dict())
        assert counter.get_total_counts() == 0


@torch.no_grad()
def _validate(model):
    model.eval()
    loss = model(torch.arange(11)).square().mean()
    model.train()
    return loss


@on(4)
def a_run_with_validation_is_one_without(folder):
    finals = []
    for validate in (False, True):
        model, _ = make()
        shard(model)
        average = polyak.WeightAverage(model, PROFILES)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(4):
            train(model, optimizer, seed=step)
            average.update()
            if validate:
                seen = model.seen.clone()
                before = sharded_zoo.whole(model)
                with average["ema"].swapped():
                    inside = sharded_zoo.whole(model)
                    _validate(model)
                assert zoo.bit_equal(sharded_zoo.whole(model) | {"seen": seen}, before)
                model.seen.copy_(seen)
                if step:
                    assert not zoo.bit_equal(inside, before)
                    inside.pop("seen")
                    assert zoo.bit_equal(inside, {k: v for k, v in average["ema"].weights().items() if k != "seen"})
        finals.append((sharded_zoo.whole(model), average["ema"].weights(), average["power"].weights()))
    for one, other in zip(*finals, strict=True):
        one.pop("seen"), other.pop("seen")
        assert zoo.bit_equal(one, other)


@on(4)
def what_is_evaluated_inside_is_the_average(folder):
    model, twin = make()
    shard(model)
    average = polyak.WeightAverage(model, PROFILES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        train(model, optimizer, seed=step)
        average.update()
    raw = _validate(model)  # leaves the root whole, with the raw weights
    twin.load_state_dict(average["ema"].weights())
    with average["ema"].swapped():
        inside = _validate(model)
    assert torch.equal(inside, _validate(twin))
    assert torch.equal(raw, _validate(model))
    assert not torch.equal(raw, inside)


@on(4)
def an_exception_in_a_forward_pass_leaves_the_weights(folder):
    model, _ = make()
    shard(model)
    model.set_modules_to_forward_prefetch([model.first])
    average = polyak.WeightAverage(model, PROFILES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, seed=0)
    average.update()
    right = _validate(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    # The first comes while parameters of another layer are on their way already.
    for layer in (model.embedding, model.norm, model.back):
        hook = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), average["ema"].swapped():
            _validate(model)
        hook.remove()
        model.train()
        assert torch.equal(_validate(model), right)


@on(4)
def training_and_changing_inside_of_a_swap_raise(folder):
    model, _ = make()
    shard(model)
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, seed=0)
    average.update()
    before = sharded_zoo.whole(model)
    model.first.weight.grad = torch.ones_like(model.first.weight)
    with pytest.raises(polyak.StateError, match="it would train the average"), average.swapped():
        optimizer.step()
    optimizer.zero_grad()

    def swap_and_change():
        with average.swapped(), torch.no_grad():
            model.gain.add_(1)

    with pytest.raises(polyak.StateError, match="changed inside of swapped"):
        swap_and_change()
    with pytest.raises(polyak.StateError, match="stands in the model now"), average.swapped():
        average.update()
    assert zoo.bit_equal(sharded_zoo.whole(model), before)


@on(4)
def replaced_tensors_are_noticed(folder):
    model, twin = make()
    shard(model)
    average, mirror = polyak.WeightAverage(model, PROFILES), Mirror(twin)
    generator = torch.Generator().manual_seed(1)
    average.update()
    mirror.update(model)
    # Other memory, as loading with assign=True and moving give it.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.head.weight = model.embedding.weight
    sharded_zoo.drift(model, generator)
    average.update()
    mirror.update(model)
    mirror.check(average)
    address = model.first.bias._local_tensor.data_ptr()
    model.double().float()
    assert model.first.bias._local_tensor.data_ptr() != address or model.first.bias.numel() < 5 or address == 0
    sharded_zoo.drift(model, generator)
    average.update()
    mirror.update(model)
    mirror.check(average)
    model.double()
    with pytest.raises(polyak.MismatchError, match=r"torch.float64, and was torch.float32; cast the model before"):
        average.update()


@on(4)
def other_memory_of_the_same_dtensor_is_noticed(folder):
    for lay in (fully_shard, lambda model: parallelize_module(model, sharded_zoo.mesh_of(4), ColwiseParallel())):
        model = nn.Linear(4, 8)
        lay(model)
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        average.update()
        parameters, before = list(model.parameters()), average.weights()
        model.double().float()
        assert all(map(operator.is_, parameters, model.parameters()))
        sharded_zoo.drift(model, torch.Generator().manual_seed(1))
        average.update()
        raw = sharded_zoo.whole(model)
        expected = {name: torch.lerp(before[name], raw[name], 0.5) for name in raw}
        assert zoo.bit_equal(average.weights(), expected)
        with average.swapped():
            assert zoo.bit_equal(sharded_zoo.whole(model), expected)


@on(4)
def another_specification_of_the_same_dtensor_is_noticed(folder):
    model = nn.Linear(8, 8, bias=False)
    fully_shard(model)
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    average.update()
    spec = model.weight._spec
    model.weight._spec = DTensorSpec(spec.mesh, (Shard(1),), spec.tensor_meta)
    with pytest.raises(polyak.MismatchError, match=r"'weight' of the model is .*Shard\(dim=1\).*, and was .*dim=0"):
        average.state_dict()


@on(4)
def another_layout_raises_and_names_both(folder):
    mesh = init_device_mesh("cpu", (4,))
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    plain = copy.deepcopy(model)
    average = polyak.WeightAverage(model, polyak.Uniform())
    fully_shard(model, mesh=mesh)
    with pytest.raises(polyak.MismatchError, match=r"is sharded as \(Shard\(dim=0\),\) over a mesh of \(4,\) ranks"):
        average.update()
    average = polyak.WeightAverage(model, polyak.Uniform())
    average.update()
    with pytest.raises(polyak.MismatchError, match=r"given model is not sharded, and was sharded as .* whole tensors"):
        average.copy_to(plain)
    plain.load_state_dict(average.weights())
    for call in (average.module, average.live_module):
        with pytest.raises(polyak.StateError, match=r"sharded over ranks .* Use `with average.swapped"):
            call()


@on(4)
def averages_are_written_back_shard_by_shard(folder):
    model, _ = make()
    shard(model)
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, seed=0)
    average.update()
    other = shard(make(1)[0])
    average.copy_to(other)
    assert zoo.bit_equal(sharded_zoo.whole(other), average.weights())
    average.write_back()
    assert zoo.bit_equal(sharded_zoo.whole(model), average.weights())
    average.reset()
    average.adapt()
    assert zoo.bit_equal(sharded_zoo.whole(model), average.weights())


@on(4)
def parts_on_another_device_than_the_mesh_stay_there(folder):
    mesh = DeviceMesh("meta", list(range(4)), _init_backend=False)
    part = torch.ones(2, 3)
    sharding = polyak.ranks.sharding.Sharding(mesh, (Shard(0),), torch.Size((7, 3)), (3, 1))
    wrapped = sharding.wrap(part)
    assert wrapped.to_local().data_ptr() == part.data_ptr()
    assert (wrapped.shape, wrapped.stride(), wrapped.dtype) == ((7, 3), (3, 1), torch.float32)
    assert polyak.ranks.sharding.sharding_of(wrapped) == sharding


@on(4)
def frozen_shards_are_watched(folder):
    model, _ = make()
    model.first.requires_grad_(False)
    shard(model)
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    average.update()
    state = average.state_dict()
    assert set(state["frozen"]) == {"first.weight", "first.bias"}
    assert not any(state["frozen"].values())  # no rank knows the sums of whole ones
    assert zoo.bit_equal(average.weights(), sharded_zoo.whole(model))
    with torch.no_grad():
        model.first.weight._local_tensor.add_(1)
    if model.first.weight._local_tensor.numel():
        with pytest.raises(polyak.StateError, match=r"'first\.weight' is frozen"):
            average.state_dict()
    average.load_state_dict(state)
    average.state_dict()


@on(4)
def ranks_agree_on_what_is_not_finite(folder):
    for lay in (lambda model: shard(model), lambda model: shard(model, sharded_zoo.mesh_of(2, 2))):
        (model, twin), (other, _) = make(), make()
        lay(model), lay(other)
        average = polyak.WeightAverage(model, PROFILES, nonfinite="skip")
        strict = polyak.WeightAverage(model, PROFILES, nonfinite="raise")
        mirror = Mirror(twin, nonfinite="skip")
        for step in range(4):
            sharded_zoo.drift(model, torch.Generator().manual_seed(step))
            kept = model.back.weight._local_tensor.clone()
            if step in (1, 2) and distributed.get_rank() == step - 1:
                model.back.weight._local_tensor[0, 0] = float("nan")
            with CommDebugMode() as counter:
                average.update()
            assert counter.get_total_counts() <= 2
            if step in (1, 2):
                own = distributed.get_rank() == step - 1
                text = "in 'back.weight'" if own else "in parts that other ranks have"
                with pytest.raises(polyak.StateError, match=text):
                    strict.update()
            mirror.model.load_state_dict(sharded_zoo.whole(model))
            if step in (1, 2):
                # Where shards are replicated, only one of the two has it.
                mirror.model.back.weight.detach()[0, 0] = float("nan")
            mirror.average.update()
            assert average.num_updates == mirror.average.num_updates == (1, 1, 1, 2)[step]
            mirror.check(average)
            model.back.weight._local_tensor.copy_(kept)


class Around(nn.Module):
    """A model that is sharded by what it is a part of."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.other = nn.Linear(2, 2)

    def forward(self, tokens):
        return self.model(tokens)


@on(2)
def a_part_of_a_sharded_model_is_averaged(folder):
    model, twin = make()
    fully_shard(model.second, mesh=sharded_zoo.mesh_of(2))
    root = fully_shard(Around(model), mesh=sharded_zoo.mesh_of(2))
    average, mirror = polyak.WeightAverage(model, PROFILES), Mirror(twin)
    optimizer = torch.optim.AdamW(root.parameters(), lr=0.1)
    for step in range(3):
        train(root, optimizer, seed=step)
        average.update(), mirror.update(model)
        mirror.check(average)
        raw = sharded_zoo.whole(model)
        root.eval()
        with torch.no_grad():
            root(torch.arange(11))  # which leaves whole parameters
            with average["ema"].swapped():
                inside = root(torch.arange(11))
            outside = root(torch.arange(11))
        root.train()
        average["power"].weights()
        with mirror.average["ema"].swapped(), torch.no_grad():
            torch.testing.assert_close(inside, mirror.model.eval()(torch.arange(11)))
        with torch.no_grad():
            torch.testing.assert_close(outside, mirror.model.eval()(torch.arange(11)))
        mirror.model.train()
        root.reshard()
        raw["seen"] = model.seen
        assert zoo.bit_equal(sharded_zoo.whole(model), raw)
        mirror.model.seen.copy_(model.seen)
