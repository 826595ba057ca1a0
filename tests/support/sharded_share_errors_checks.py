"""`shard_over`: what one rank does otherwise, or cannot do, is one clear error on all, and nothing is written."""

import copy
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import polyak
import zoo
from polyak.ranks import messages
from polyak.store import shares as gather
from ranks import on
from sharded_share_checks import Odd, drift, same_on_all
from sharded_zoo import make, mesh_of, shard


@on(4)
def ranks_that_are_apart_are_told_before_anything_is_written(folder):
    own = distributed.get_rank() == 2
    model, _ = same_on_all(zoo.mlp)
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    average.update()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = folder / "apart.safetensors"
    calls = {"swapped": average.swap_in, "weights": average.weights, "export": lambda: average.export(path)}
    calls |= {"module": average.module, "copy_to": average.write_back, "report": average.report}
    for name, call in calls.items():
        with pytest.raises(polyak.MismatchError, match=rf"{name}\(.*\): .* different '2.bias'\. .*nothing was written"):
            _with(model[2].bias, 1.0 * own, call)
    assert not path.exists()
    assert zoo.bit_equal(model.state_dict(), kept)
    with pytest.raises(polyak.MismatchError, match=r"apart: 2.bias of the model: ranks 0, 1, 3 against 2\."):
        _with(model[2].bias, 1.0 * own, average.check_in_sync)
    with average.swapped():
        pass
    if own:
        average.update()
    with pytest.raises(polyak.MismatchError, match=r"ranks have made different updates, this one [12] until"):
        average.swap_in()
    # Also where the average is made, as before a wrapper has made the weights the same.
    with pytest.raises(polyak.MismatchError, match=r"shard_over: .* different '0.weight'"):
        _with(model[0].weight, 1.0 * own, lambda: polyak.WeightAverage(model, shard_over=distributed.group.WORLD))
    with pytest.raises(polyak.MismatchError, match="the tensors of the model"):
        polyak.WeightAverage(nn.Linear(2, 3 if own else 4), shard_over=distributed.group.WORLD)


@on(4)
def all_hear_of_replicas_that_are_apart(folder):
    model, _ = make()
    mesh = mesh_of(2, 2)
    shard(model, mesh)
    average = polyak.WeightAverage(model, shard_over=mesh["outer"])
    average.update()
    rank = distributed.get_rank()
    with torch.no_grad():
        # Of the two pairs of ranks that share, one is apart.
        model.gain._local_tensor[0] += float(rank == 0)
    names = "'gain'" if rank in (0, 2) else "weights, others than this one"
    with pytest.raises(polyak.MismatchError, match=f"ranks that share averages have different {names}"):
        average.swap_in()
    assert not average.is_swapped


@torch.no_grad()
def _with(tensor, change, call):
    """Calls while a tensor is changed."""
    kept = tensor.clone()
    tensor += change
    try:
        return call()
    finally:
        tensor.copy_(kept)


@on(4)
def what_one_rank_changes_inside_raises_on_all(folder):
    model, _ = same_on_all(Odd)
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    drift(0, model)
    average.update()
    drift(1, model)
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = distributed.get_rank() == 1
    with (
        pytest.raises(polyak.StateError, match=f"inside of swapped.*{'one.weight' if own else 'on another rank'}"),
        average.swapped(),
        torch.no_grad(),
    ):
        model.one.weight[-1].mul_(2 if own else 1)  # in the share of another rank
    assert zoo.bit_equal(model.state_dict(), raw)
    # A tensor that was replaced gets the weights back, and an error elsewhere leaves them as they were.
    with pytest.raises(polyak.StateError, match="few_rows"), average.swapped():
        model.few_rows.data = torch.zeros(3, 50)
    assert zoo.bit_equal(model.state_dict(), raw)
    with pytest.raises(KeyboardInterrupt), average.swapped():
        raise KeyboardInterrupt
    assert zoo.bit_equal(model.state_dict(), raw)


@on(4)
def an_error_that_one_rank_sees_is_one_on_all(folder):
    model, _ = same_on_all(Odd)
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    average.update()
    own = distributed.get_rank() == 3
    for call in (average.swap_in, average.weights, average.report, average.module):
        extra = nn.Linear(1, 1) if own else None
        model.add_module("extra", extra)
        error, text = (polyak.MismatchError, "extra.weight") if own else (polyak.StateError, "another rank raised")
        with pytest.raises(error, match=text):
            call()
        del model.extra
    assert not average.is_swapped
    with average.swapped():
        pass


@on(4)
def what_cannot_be_shared_is_said(folder):
    model, _ = make()
    world = distributed.group.WORLD
    with pytest.raises(TypeError, match=r"shard_over='world': a process group, such as torch.distributed.group.WORLD"):
        polyak.WeightAverage(model, shard_over="world")
    with pytest.raises(
        polyak.StateError, match=r"a mesh of one dimension is needed; take one of its 2, as in mesh\['ou"
    ):
        polyak.WeightAverage(model, shard_over=mesh_of(2, 2))
    two = distributed.new_group([0, 1])
    if distributed.get_rank() > 1:
        with pytest.raises(
            polyak.StateError, match=r"shard_over: rank [23] is not in the process group that was given"
        ):
            polyak.WeightAverage(model, shard_over=two)
    average = polyak.WeightAverage(model, shard_over=world)
    with pytest.raises(polyak.StateError, match=r"live_module\(\) with shard_over=: .*module\(\) puts it together"):
        average.live_module()
    for call in (copy.deepcopy, pickle.dumps):
        with pytest.raises(polyak.StateError, match="cannot be pickled or copied, because process groups cannot"):
            call(average)
    for mesh, over in ((mesh_of(4), world), (mesh_of(2, 2), None), (mesh_of(2, 2), world)):
        sharded, _ = make()
        shard(sharded, mesh)
        with pytest.raises(polyak.StateError, match=r"shard_over: '.*' is sharded as .* not replicated over the"):
            polyak.WeightAverage(sharded, shard_over=mesh["inner"] if over is None else over)


@on(2)
def what_one_rank_replaces_inside_raises_on_all(folder):
    model, _ = same_on_all(zoo.mlp)
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    average.update()
    own = distributed.get_rank() == 0
    text = r"0\.weight" if own else "on another rank"
    with pytest.raises(polyak.StateError, match=f"inside of swapped.*{text}"), average.swapped():
        model[0].weight.data = 2 * model[0].weight.data if own else model[0].weight.data


@on(2)
def ranks_hold_tensors_in_the_same_order_in_memory(folder):
    model, _ = same_on_all(lambda: nn.Conv2d(3, 5, 3))
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    average.update()
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if distributed.get_rank() == 0:
        model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
    with pytest.raises(polyak.MismatchError, match=r"have different 'weight'.* in the same order in memory"):
        average.swap_in()
    assert zoo.bit_equal(model.state_dict(), raw)


@on(2)
def who_is_interrupted_while_waiting_sends_nothing_twice(folder, monkeypatch=pytest.MonkeyPatch):
    own = distributed.get_rank() == 0

    def late():
        if own:
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        else:
            time.sleep(0.6)

    for module, function in ((gather, "_all_gather"), (messages, "_reduce")):
        model, _ = same_on_all(zoo.mlp)
        average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
        average.update()
        drift(1, model)
        raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        interrupted = False
        with monkeypatch.context() as patch:
            patch.setattr(gather, "_MESSAGE_BYTES", 64)
            patch.setattr(gather, "_LEAST_BYTES", 16)
            call = getattr(module, function)

            def first(*args, call=call, patch=patch, module=module, function=function, **kwargs):
                patch.setattr(module, function, call)
                late()
                return call(*args, **kwargs)

            try:
                with average.swapped():
                    patch.setattr(module, function, first)
            except KeyboardInterrupt:
                interrupted = True
        assert interrupted == own
        assert zoo.bit_equal(model.state_dict(), raw)


@on(2)
def no_room_for_a_swap_on_one_rank_is_an_error_on_all(folder, monkeypatch=pytest.MonkeyPatch):
    model, _ = same_on_all(lambda: zoo.mlp().half())
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    average.update()
    drift(1, model)
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError

    own = distributed.get_rank() == 0
    error = torch.OutOfMemoryError if own else polyak.StateError
    with monkeypatch.context() as patch:
        if own:
            patch.setattr("torch.empty_like", no_room)
        with pytest.raises(error):
            average.swap_in()
    assert not average.is_swapped
    assert zoo.bit_equal(model.state_dict(), raw)
    with average.swapped():
        pass


@on(2)
def averages_are_written_to_models_that_are_alike(folder):
    model, _ = same_on_all(lambda: nn.Conv2d(3, 8, 3))
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    drift(0, model)
    average.update()
    own = distributed.get_rank() == 1
    for change, what in (
        ({"memory_format": torch.channels_last}, r"'weight'\."),
        ({"dtype": torch.half}, "'weight', "),
    ):
        target = nn.Conv2d(3, 8, 3).to(**change if own else {})
        kept = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        with pytest.raises(polyak.MismatchError, match=rf"copy_to\(\): ranks gave models that differ in {what}"):
            average.copy_to(target)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in target.state_dict().items())
    target = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    average.copy_to(target)
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in average.weights().items())


@on(2)
def ranks_that_adapt_to_different_models_are_told(folder):
    own = distributed.get_rank() == 1
    for shares in (True, False):
        model, _ = same_on_all(zoo.mlp)
        added = nn.Linear(3, 3)
        if not shares:
            shard_whole(model), shard_whole(added)
        average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD if shares else None)
        average.update()
        if own:
            model.add_module("extra", added)
        average.adapt()
        for call in (average.weights, average.report) + (average.swap_in,) * shares:
            with pytest.raises(polyak.MismatchError, match=r"ranks average different tensors, as after an adapt\(\)"):
                call()
        assert not average.is_swapped


@on(2)
def no_room_for_averages_on_one_rank_is_an_error_on_all(folder, monkeypatch=pytest.MonkeyPatch):
    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError

    model, _ = same_on_all(zoo.mlp)
    own = distributed.get_rank() == 0
    for shares in (True, False):
        options = {"shard_over": distributed.group.WORLD} if shares else {}
        if not shares:
            shard_whole(model)
        with monkeypatch.context() as patch:
            if own:
                patch.setattr("polyak.store.modes.Modes.average_of", no_room)
            with pytest.raises(torch.OutOfMemoryError if own else polyak.StateError):
                polyak.WeightAverage(model, **options)
        polyak.WeightAverage(model, **options).update()


@on(2)
def models_cut_along_different_dimensions_are_told_apart(folder):
    own = distributed.get_rank() == 1
    model = nn.Linear(4, 4)
    shard_whole(model, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1 if own else 0))
    with pytest.raises(polyak.MismatchError, match=r"the tensors of the model, or rules=: ranks 0 against 1"):
        polyak.WeightAverage(model)


def shard_whole(model, **options):
    return fully_shard(model, mesh=mesh_of(2), **options)
