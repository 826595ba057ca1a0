"""Shards whose averages a worker updates on the host: the bits of one process, and the same updates on all ranks."""

import copy
import threading

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint

import polyak
import sharded_zoo
import zoo
from host_cases import Machine, Slow
from polyak.store import store as local
from ranks import on
from sharded_zoo import PROFILES, Mirror, make, shard, train


def pair(**options):
    """A sharded model with averages on the host, its optimizer, and the same in one process and place."""
    model, twin = make()
    shard(model)
    machine = Machine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "transfer_for", machine.transfer_for)
        average = polyak.WeightAverage(model, PROFILES, device="cpu", **options)
    assert average._core.store.num_staging_bytes > 0
    return machine, model, torch.optim.AdamW(model.parameters(), lr=0.1), average, Mirror(twin, **options)


@on(2)
def averages_on_the_host_are_those_of_one_process(folder):
    for options in ({}, {"compensated": True}, {"dtype": torch.bfloat16}, {"nonfinite": "skip"}):
        _, model, optimizer, average, mirror = pair(**options)
        for step in range(4):
            train(model, optimizer, seed=step)
            average.update()
            mirror.update(model)
        mirror.check(average)
        raw = sharded_zoo.whole(model)
        with average["ema"].swapped(), mirror.average["ema"].swapped():
            assert zoo.bit_equal(sharded_zoo.whole(model), dict(mirror.model.state_dict()))
        assert zoo.bit_equal(sharded_zoo.whole(model), raw)
        average.check_in_sync(buffers=False)


@on(2)
def a_busy_host_holds_up_its_rank_so_that_all_make_the_same_updates(folder):
    machine, model, optimizer, average, mirror = pair()
    if distributed.get_rank() == 1:
        machine.copied = Slow
        machine.gate.clear()
        threading.Timer(0.3, machine.gate.set).start()
    for step in range(5):
        train(model, optimizer, seed=step)
        average.update()
        mirror.update(model)
    assert average.num_updates == 5
    mirror.check(average)
    average.check_in_sync(buffers=False)


@on(2)
def a_checkpoint_of_averages_on_the_host_goes_on_bit_for_bit(folder):
    _, model, optimizer, average, mirror = pair()
    for step in range(3):
        train(model, optimizer, seed=step)
        average.update()
        mirror.update(model)
    path = folder / "host"
    checkpoint.save({"average": average.state_dict()}, checkpoint_id=path)
    kept = copy.deepcopy(average["ema"].weights())
    train(model, optimizer, seed=9)
    average.update()
    state = {"average": average.state_dict()}
    checkpoint.load(state, checkpoint_id=path)
    average.load_state_dict(state["average"])
    assert zoo.bit_equal(average["ema"].weights(), kept)
    train(model, optimizer, seed=3)
    average.update()
    mirror.update(model)
    mirror.check(average)


@on(2)
def shares_are_updated_on_the_host(folder):
    for options in ({}, {"compensated": True}, {"nonfinite": "skip"}):
        torch.manual_seed(0)
        model, twin = zoo.batchnorm(), zoo.batchnorm()
        twin.load_state_dict(model.state_dict())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local, "transfer_for", Machine().transfer_for)
            world = distributed.group.WORLD
            average = polyak.WeightAverage(model, PROFILES, device="cpu", shard_over=world, **options)
        reference = polyak.WeightAverage(twin, PROFILES, **options)
        staging = average.report().num_staging_bytes
        assert 0 < staging < 2 * 0.7 * sum(t.numel() * t.element_size() for t in model.state_dict().values()) + 1024
        for step in range(3):
            sharded_zoo.drift(model, torch.Generator().manual_seed(step))
            sharded_zoo.drift(twin, torch.Generator().manual_seed(step))
            average.update(), reference.update()
        raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert zoo.bit_equal(average["power"].weights(), reference["power"].weights())
        with average["ema"].swapped(), reference["ema"].swapped():
            assert zoo.bit_equal(model.state_dict(), twin.state_dict())
            assert zoo.bit_equal(average.raw_weights(), raw)
        assert zoo.bit_equal(model.state_dict(), raw)
