"""FSDP1, whose ranks have stretches of parameters; and what only FSDP2 can do, which errors say."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.debug import CommDebugMode

import polyak
import zoo
from ranks import on
from sharded_layout_checks import make
from sharded_zoo import mesh_of

PROFILES = {"power": polyak.Power(relative_std=0.1), "ema": polyak.Exponential(0.9)}


def wrap(model, **options):
    options = {"use_orig_params": True, **options}
    policy = ModuleWrapPolicy({nn.Linear})
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), auto_wrap_policy=policy, **options)


def whole(model):
    return zoo.clone(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def train(model, optimizer, *, seed):
    torch.manual_seed(seed * 10 + distributed.get_rank())
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def validate(model):
    return model(torch.ones(2, 6))


@on(2)
def stretches_of_parameters_are_averaged(folder):
    finals = []
    for validates in (False, True):
        model, twin = wrap(make()), make()
        average, mirror = polyak.WeightAverage(model, PROFILES), polyak.WeightAverage(twin, PROFILES)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(4):
            train(model, optimizer, seed=step)
            with CommDebugMode() as counter:
                average.update()
            assert counter.get_total_counts() == 0
            twin.load_state_dict(whole(model))
            mirror.update()
            for name in PROFILES if validates else ():
                validate(model)
                with average[name].swapped():
                    inside = validate(model)
                    assert zoo.bit_equal(whole(model), mirror[name].weights())
                    inside = validate(model)
                with mirror[name].swapped():
                    torch.testing.assert_close(inside, validate(twin))
                torch.testing.assert_close(validate(model), validate(twin))
        finals.append(whole(model))
    assert zoo.bit_equal(*finals)


@on(2)
def a_rank_has_a_state_of_its_own(folder):
    runs = []
    for resumes in (False, True):
        model = wrap(make())
        average = polyak.WeightAverage(model, PROFILES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            train(model, optimizer, seed=step)
            average.update()
            if resumes and step == 1:
                checkpoint.save(average.state_dict(), checkpoint_id=folder / "flat")
                average = polyak.WeightAverage(model, PROFILES)
                state = copied(average)
                checkpoint.load(state, checkpoint_id=folder / "flat")
                average.load_state_dict(state)
        with average["ema"].swapped():
            runs.append(whole(model))
    assert zoo.bit_equal(*runs)


def copied(average):
    average.update()  # a state before the first update comes with a warning
    return average.state_dict()


@on(2)
def errors_name_the_second_kind(folder):
    model = wrap(make())
    average = polyak.WeightAverage(model)
    average.update()
    for call in (average.weights, average.raw_weights, average.module, average.live_module):
        with pytest.raises(polyak.StateError, match=r"spreads over 2 ranks: .* fully_shard \(FSDP2\)"):
            call()
    with pytest.raises(polyak.StateError, match=r"export\(\) of a model .* fully_shard \(FSDP2\)"):
        average.export(folder / "flat.safetensors")
    for options in ({"dtype": torch.bfloat16}, {"nonfinite": "skip"}, {"shard_over": distributed.group.WORLD}):
        with pytest.raises(polyak.StateError, match=r"leave out what of these was given, or .* fully_shard \(FSDP2\)"):
            polyak.WeightAverage(model, **options)
    with pytest.raises(polyak.StateError, match=r"without use_orig_params=True .* fully_shard \(FSDP2\)"):
        polyak.WeightAverage(wrap(make(), use_orig_params=False))
    with pytest.raises(polyak.StateError, match=r"ModelEma keeps a whole module, and this Mlp is sharded"):
        polyak.ModelEma(model)


@on(2)
def a_part_of_what_is_spread_is_refused(folder):
    model = FullyShardedDataParallel(make(), device_id=torch.device("cpu"), use_orig_params=True)
    for part in (model.module, model.module.up):
        with pytest.raises(polyak.StateError, match=r"stretches of parameters, of a FullyShardedDataParallel that it"):
            polyak.WeightAverage(part)
    polyak.WeightAverage(model).update()


@on(2)
def what_is_summoned_is_left_alone(folder):
    """Resharding there would write garbage back over the shards."""
    model = wrap(make())
    average = polyak.WeightAverage(model, PROFILES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, seed=0)
    before = whole(model)
    with FullyShardedDataParallel.summon_full_params(model):
        for call in (average.update, average.report, lambda: polyak.WeightAverage(model)):
            with pytest.raises(polyak.StateError, match=r"inside of summon_full_params\(\) the model has whole"):
                call()
    assert zoo.bit_equal(whole(model), before)
    average.update()


@on(4)
def replicas_of_stretches_are_compared(folder):
    own = distributed.get_rank() == 1
    model = wrap(make(), sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh_of(2, 2))
    average = polyak.WeightAverage(model, PROFILES)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=0)
    average.update()
    average.check_in_sync()
    with torch.no_grad():
        average._core.store.averages["ema"]["up.weight"].flatten()[:1].add_(own)
    with pytest.raises(polyak.MismatchError, match=r"apart: up\.weight \(ema\): ranks 1 against 3\."):
        average.check_in_sync()
    other = polyak.WeightAverage(model, rules={"*.bias": "copy"} if own else {})
    with pytest.raises(polyak.MismatchError, match=r"or rules=: ranks 0, 2, 3 against 1"):
        other.check_in_sync()
