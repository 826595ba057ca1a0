"""The state of a sharded average through torch.distributed.checkpoint, on to other numbers and meshes of ranks."""

import warnings

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

import polyak
import sharded_zoo
import zoo
from polyak.ranks.sharding import local
from ranks import on
from sharded_zoo import PROFILES, make, mesh_of, shard, train

OPTIONS = {"plain": {}, "compensated": {"compensated": True}, "stochastic": {"dtype": torch.bfloat16, "seed": 3}}


def _advance(model, average, *, first, steps):
    """Moves the model by the same numbers on any number of ranks."""
    for step in range(first, first + steps):
        sharded_zoo.drift(model, torch.Generator().manual_seed(step))
        average.update()


def _made(mesh, options, **others):
    model, _ = make()
    if mesh is not None:
        shard(model, mesh)
    return model, polyak.WeightAverage(model, PROFILES, **{**options, **others})


def _resume(folder, mesh, **dcp):
    """Loads what four ranks saved, compares, goes on, and compares with a run that never stopped."""
    for mode, options in OPTIONS.items():
        model, average = _made(mesh, options)
        weights = {"model": model.state_dict()}
        checkpoint.load(weights, checkpoint_id=folder / f"{mode}-model", **dcp)
        model.load_state_dict(weights["model"])
        state = average.state_dict()
        checkpoint.load(state, checkpoint_id=folder / mode, **dcp)
        average.load_state_dict(state)
        assert average.num_updates == 3
        assert zoo.bit_equal(average["ema"].weights(), torch.load(folder / f"{mode}-3.pt"))
        _advance(model, average, first=3, steps=3)
        assert zoo.bit_equal(average["ema"].weights(), torch.load(folder / f"{mode}-6.pt"))
        if mode == "compensated":
            assert zoo.bit_equal(sharded_zoo.seconds_of(average), torch.load(folder / "seconds-6.pt"))


@on(4)
def saved_by_four_ranks(folder):
    for mode, options in OPTIONS.items():
        model, average = _made(mesh_of(4), options)
        _advance(model, average, first=0, steps=3)
        state = average.state_dict()
        first = next(iter(next(iter(state["averages"].values())).values()))["first.weight"]
        assert isinstance(first, DTensor)
        assert (first.shape, first.stride(), first.placements) == (
            model.first.weight.shape,
            model.first.weight.stride(),
            model.first.weight.placements,
        )
        checkpoint.save(state, checkpoint_id=folder / mode)
        checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder / f"{mode}-model")
        kept = {3: average["ema"].weights()}
        _advance(model, average, first=3, steps=3)
        kept[6] = average["ema"].weights()
        seconds = sharded_zoo.seconds_of(average) if mode == "compensated" else {}
        if distributed.get_rank() == 0:
            for step, weights in kept.items():
                torch.save(weights, folder / f"{mode}-{step}.pt")
            torch.save(seconds, folder / "seconds-6.pt") if seconds else None
        # One process comes to the same.
        alone, twin = _made(None, options)
        _advance(alone, twin, first=0, steps=6)
        assert zoo.bit_equal(twin["ema"].weights(), kept[6])


@on(4)
def loaded_by_four_ranks_on_two_dimensions(folder):
    _resume(folder, mesh_of(2, 2))


@on(2)
def loaded_by_two_ranks(folder):
    _resume(folder, mesh_of(2))


@on(2)
def loaded_by_two_ranks_that_replicate(folder):
    _resume(folder, mesh_of(2, 1))


@on(1)
def loaded_by_one_rank(folder):
    _resume(folder, mesh_of(1))


@on(1)
def loaded_by_one_process_without_shards(folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the average is saved after 0 updates")
        _resume(folder, None)


@on(4)
def saved_while_training_goes_on(folder):
    model, average = _made(mesh_of(4), {})
    _advance(model, average, first=0, steps=3)
    before = average["ema"].weights()
    saving = checkpoint.async_save(average.state_dict(), checkpoint_id=folder / "async")
    _advance(model, average, first=3, steps=2)
    saving.result()
    distributed.barrier()
    model, average = _made(mesh_of(4), {})
    state = average.state_dict()
    checkpoint.load(state, checkpoint_id=folder / "async")
    average.load_state_dict(state)
    assert zoo.bit_equal(average["ema"].weights(), before)


@on(4)
def an_average_is_saved_and_loaded_as_it_is(folder):
    model, average = _made(mesh_of(4), {})
    _advance(model, average, first=0, steps=2)
    checkpoint.save({"model": model.state_dict(), "average": average}, checkpoint_id=folder / "stateful")
    before = average["ema"].weights()
    _advance(model, average, first=2, steps=1)
    checkpoint.load({"model": model.state_dict(), "average": average}, checkpoint_id=folder / "stateful")
    assert average.num_updates == 2
    assert zoo.bit_equal(average["ema"].weights(), before)
    _, other = _made(mesh_of(4), {"every": 2})
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: average\.averages"):
        checkpoint.load({"average": other}, checkpoint_id=folder / "stateful")


@on(4)
def another_configuration_fails_in_planning(folder):
    changes = [
        {"every": 2},
        {"start": 3.0},
        {"dtype": torch.float64},
        {"compensated": True},
    ]
    others = [_made(mesh_of(4), change) for change in changes]
    model, _ = make()
    shard(model)
    others.append((model, polyak.WeightAverage(model, {**PROFILES, "ema": polyak.Exponential(0.95)})))
    others.append((model, polyak.WeightAverage(model, {**PROFILES, "third": polyak.Uniform()})))
    for model, average in others:
        _advance(model, average, first=7, steps=1)
        before = {name: average[name].weights() for name in average.profiles}
        with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: averages"):
            checkpoint.load(average.state_dict(), checkpoint_id=folder / "plain")
        assert all(zoo.bit_equal(average[name].weights(), before[name]) for name in before)


@on(4)
def a_state_inside_of_a_swap_is_that_of_the_average(folder):
    model, _ = make()
    shard(model)
    average = polyak.WeightAverage(model, PROFILES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        train(model, optimizer, seed=step)
        average.update()
    right = average["ema"].weights()
    with average["ema"].swapped():
        with torch.no_grad():
            model.eval()(torch.arange(11))
        state = average.state_dict()
    _advance(model, average, first=0, steps=1)
    with pytest.raises(polyak.StateError, match="stands in the model now"), average["ema"].swapped():
        average.load_state_dict(state)
    average.load_state_dict(state)
    found = average["ema"].weights()
    right["seen"] = found["seen"]  # counted by the pass inside
    assert zoo.bit_equal(found, right)


@on(4)
def whole_states_are_cut_and_other_layouts_refused(folder):
    _, twin = _made(None, {})
    generator = torch.Generator().manual_seed(5)
    sharded_zoo.drift(twin._core.source.model, generator)
    twin.update()
    _, average = _made(mesh_of(4), {})
    average.load_state_dict(twin.state_dict())
    assert zoo.bit_equal(average["power"].weights(), twin["power"].weights())
    _, other = _made(mesh_of(2, 2), {})
    with pytest.raises(polyak.MismatchError, match=r"\(4,\) ranks, and sharded as .*torch.distributed.checkpoint"):
        other.load_state_dict(average.state_dict())
    with pytest.raises(polyak.MismatchError, match=r"\(4,\) ranks, and not sharded here"):
        twin.load_state_dict(average.state_dict())


def _partly_frozen(prepare):
    model, _ = make()
    model.first.requires_grad_(False)
    return model, polyak.WeightAverage(model, PROFILES, **prepare(model))


def _moved(model, average):
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not name.startswith("first"):
                tensor.add_(1)
    average.update()


@on(4)
def frozen_parameters_are_saved_by_four(folder):
    model, average = _partly_frozen(lambda model: [shard(model), {}][1])
    _moved(model, average)
    checkpoint.save({"average": average}, checkpoint_id=folder / "frozen")
    whole, other = _partly_frozen(lambda model: {})
    _moved(whole, other)
    assert other.state_dict()["frozen"]["first.weight"]
    assert zoo.bit_equal(average["ema"].weights(), other["ema"].weights())
    # A whole state knows the sums of whole parameters, which parts have not.
    average.load_state_dict(other.state_dict())
    average.state_dict()
    if distributed.get_rank() == 0:
        torch.save(other["ema"].weights(), folder / "frozen.pt")


def _resume_frozen(folder, prepare):
    model, average = _partly_frozen(prepare)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the average is saved after 0 updates")
        checkpoint.load({"average": average}, checkpoint_id=folder / "frozen")
    assert zoo.bit_equal(average["ema"].weights(), torch.load(folder / "frozen.pt"))
    checkpoint.save({"average": average}, checkpoint_id=folder / f"frozen-{distributed.get_world_size()}")
    checkpoint.load({"average": average}, checkpoint_id=folder / f"frozen-{distributed.get_world_size()}")
    with torch.no_grad():
        local(model.first.bias).add_(1)
    with pytest.raises(polyak.StateError, match=r"'first\.bias' is frozen"):
        average.state_dict()


@on(2)
def frozen_parameters_are_loaded_by_two_that_share(folder):
    _resume_frozen(folder, lambda model: {"shard_over": distributed.group.WORLD})


@on(1)
def frozen_parameters_are_loaded_by_one_process_without_shards(folder):
    _resume_frozen(folder, lambda model: {})


@on(2)
def parts_of_another_rank_are_refused(folder):
    for prepare in (lambda model: [shard(model), {}][1], lambda model: {"shard_over": distributed.group.WORLD}):
        model, average = _partly_frozen(prepare)
        _moved(model, average)
        rank = distributed.get_rank()
        torch.save(average.state_dict(), folder / f"rank-{rank}.pt")
        distributed.barrier()
        before = average["ema"].weights()
        average.load_state_dict(torch.load(folder / f"rank-{rank}.pt", weights_only=False))
        with pytest.raises(polyak.MismatchError, match=r"is another rank's part\. Nothing was written"):
            average.load_state_dict(torch.load(folder / f"rank-{1 - rank}.pt", weights_only=False))
        assert zoo.bit_equal(average["ema"].weights(), before)
        distributed.barrier()
