"""`check_in_sync`: ranks have the same averages where they should, and all of them hear of it where they have not."""

import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import polyak
import sharded_zoo
import zoo
from ranks import on
from sharded_zoo import PROFILES, Mirror, make, mesh_of, shard


@on(4)
def ranks_of_data_parallel_training_have_the_same(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.parallel.DistributedDataParallel(zoo.batchnorm())
    average = polyak.WeightAverage(model, PROFILES, compensated=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(step * 10 + distributed.get_rank())
        model(torch.randn(2, 2, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    average.check_in_sync(buffers=False)
    with pytest.raises(polyak.MismatchError, match=r"running_mean \(power\): ranks 0 against 1.*buffers=False leaves"):
        average.check_in_sync()
    own = distributed.get_rank() == 2
    weight = average._core.store.averages["ema"]["0.weight"].flatten()
    if own:
        weight[:2] = weight[:2].flip(0)  # the sum of all bits stays
    with pytest.raises(polyak.MismatchError, match=r"ranks are apart: 0.weight \(ema\): ranks 0, 1, 3 against 2\."):
        average.check_in_sync(buffers=False)
    if own:
        weight[:2] = weight[:2].flip(0)
        average._core.store.seconds["ema"]["0.weight"][0] ^= 1
    with pytest.raises(polyak.MismatchError, match=r"apart: 0.weight \(ema\): ranks 0, 1, 3 against 2\."):
        average.check_in_sync(buffers=False)


@on(4)
def one_rank_that_made_another_update_is_found(folder):
    average = polyak.WeightAverage(zoo.mlp(), polyak.Uniform())
    average.check_in_sync()
    average.update()
    if distributed.get_rank() == 1:
        average.update()
    with pytest.raises(polyak.MismatchError, match=r"the clock: ranks 0, 2, 3 against 1"):
        average.check_in_sync()


@on(4)
def an_error_on_one_rank_is_one_on_all(folder):
    model = zoo.mlp()
    average = polyak.WeightAverage(model)
    if distributed.get_rank() == 3:
        model[0].extra = nn.Parameter(torch.ones(1))
    text = r"Only the model: '0.extra'"
    with pytest.raises(ValueError, match=text if distributed.get_rank() == 3 else f"on rank 3: MismatchError.*{text}"):
        average.check_in_sync()


@on(4)
def replicas_of_shards_are_compared(folder):
    for mesh, replicas in ((mesh_of(4), False), (mesh_of(2, 2), True)):
        model, _ = make()
        shard(model, mesh)
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        sharded_zoo.drift(model, torch.Generator().manual_seed(1))
        average.update()
        average.check_in_sync()
        if distributed.get_rank() == 0:
            average._core.store.averages["average"]["gain"][0] += 1
        if replicas:
            with pytest.raises(polyak.MismatchError, match=r"apart: gain \(average\): ranks 0 against 2\."):
                average.check_in_sync()
        else:
            average.check_in_sync()


@on(4)
def ranks_with_different_averages_are_told_apart(folder):
    own = distributed.get_rank() == 2
    averages = [
        polyak.WeightAverage(zoo.mlp(), polyak.Exponential(0.5 if own else 0.9)),
        polyak.WeightAverage(zoo.mlp(), every=2 if own else 1),
        polyak.WeightAverage(zoo.mlp(), compensated=own),
        polyak.WeightAverage(zoo.mlp(), nonfinite="skip" if own else "raise"),
        polyak.WeightAverage(zoo.mlp(), rules={"0.bias": "copy"} if own else None),
    ]
    named = ["the profiles", "every= or start=", "dtype=, compensated= or seed=", "nonfinite=", "or rules="]
    for average, text in zip(averages, named, strict=True):
        average.update()
        with pytest.raises(polyak.MismatchError, match=f"{text}: ranks 0, 1, 3 against 2"):
            average.check_in_sync()


@on(4)
def sharded_models_are_compared_when_averages_are_made(folder):
    own = distributed.get_rank() == 2
    for mesh in (mesh_of(4), mesh_of(2, 2)):
        model, _ = make()
        shard(model, mesh)
        for text, options in {
            "the profiles": {"profile": polyak.Exponential(0.5 if own else 0.9)},
            "every= or start=": {"every": 2 if own else 1},
            "dtype=, compensated= or seed=": {"compensated": own},
            "nonfinite=": {"nonfinite": "skip" if own else "raise"},
            "rules=": {"rules": {"*norm*": "copy"} if own else {}},
        }.items():
            with pytest.raises(polyak.MismatchError, match=f"ranks average differently: .*({text}|than this one)"):
                polyak.WeightAverage(model, **options)
        polyak.WeightAverage(model, polyak.Exponential(0.5)).check_in_sync(buffers=False)


@on(4)
def all_ranks_report_the_same(folder):
    model, twin = make()
    shard(model, mesh_of(2, 2))
    average, mirror = polyak.WeightAverage(model, PROFILES), Mirror(twin)
    for step in range(3):
        sharded_zoo.drift(model, torch.Generator().manual_seed(step))
        average.update(), mirror.update(model)
    report, expected = average.report(), mirror.average.report()
    assert report.source_moved
    assert report.stuck == ()
    for found, wanted in zip(report.averages, expected.averages, strict=True):
        assert found.distance == pytest.approx(wanted.distance, rel=1e-12)
        assert found.distances == pytest.approx(wanted.distances, rel=1e-12)
    # Something that moves on other ranks only has moved; and an average that stays where it is there, too, is stuck.
    average.reset()
    place = model.embedding.weight._local_tensor
    if distributed.get_rank() % 2:
        place.add_(1)
    assert average.report().source_moved
    store = average._core.store
    store.updates = store.updates.resume(store.updates.ledger()._replace(made=1))
    assert average.report().stuck == ("embedding.weight",)


@on(4)
def plain_tensors_of_one_rank_are_its_own(folder):
    rank = distributed.get_rank()
    model, _ = make()
    experts = nn.ModuleDict({f"expert_{rank}_{number}": nn.Linear(2, 2 + rank) for number in range(1 + rank)})
    shard(model)
    model.experts = experts
    average = polyak.WeightAverage(model, polyak.Uniform())
    sharded_zoo.drift(model, torch.Generator().manual_seed(0))
    average.update()
    report = average.report()
    assert report.stuck == ()
    assert set(report.averages[0].distances) > {"embedding", "experts"}
    assert f"experts.expert_{rank}_0.weight" in average.weights()


@on(4)
def parts_of_different_updates_are_not_put_together(folder):
    model, _ = make()
    shard(model)
    average = polyak.WeightAverage(model, polyak.Uniform())
    average.update()
    if distributed.get_rank() == 1:
        average.update()
    text = rf"ranks have made different updates, this one {1 + (distributed.get_rank() == 1)} until time"
    path = folder / "apart.safetensors"
    for call in (average.weights, average.report, lambda: average.export(path)):
        with pytest.raises(polyak.MismatchError, match=text):
            call()
    assert not path.exists()


@on(4)
def experts_over_fewer_ranks_may_have_names_of_their_own(folder):
    mesh = mesh_of(2, 2)
    expert = f"expert_{mesh.get_local_rank('inner')}"
    model = nn.ModuleDict({"dense": nn.Linear(4, 4), expert: nn.Linear(4, 4)})
    fully_shard(model[expert], mesh=mesh["outer"])
    fully_shard(model["dense"], mesh=mesh_of(4))
    average = polyak.WeightAverage(model)
    average.update()
    with average.swapped():
        pass
    own = distributed.get_rank() == 3
    with pytest.raises(polyak.MismatchError, match=r"ranks average differently: .*the tensors of the model"):
        polyak.WeightAverage(model, rules={"*.bias": "skip"} if own else {})


@on(4)
def ranks_of_meshes_that_cross_hear_of_each_other(folder):
    mesh = mesh_of(2, 2)
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    fully_shard(model["first"], mesh=mesh["outer"])
    fully_shard(model["second"], mesh=mesh["inner"])
    for ahead in ((3,), (2, 3), (1, 3)):
        average = polyak.WeightAverage(model, polyak.Uniform())
        average.update()
        average.weights()
        if distributed.get_rank() in ahead:
            average.update()
        with pytest.raises(polyak.MismatchError, match="ranks have made different updates"):
            average.weights()


@on(4)
def ranks_that_ask_for_different_things_are_told(folder):
    model, _ = make()
    shard(model)
    shared = zoo.mlp()
    own = distributed.get_rank() == 2
    average = polyak.WeightAverage(model, PROFILES)
    average.update()
    sharing = polyak.WeightAverage(shared, PROFILES, shard_over=distributed.group.WORLD)
    sharing.update()
    name, path = ("power" if own else "ema"), folder / "different.safetensors"
    kept = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    calls = [average[name].weights, lambda: average[name].export(path), sharing[name].swap_in, sharing[name].write_back]
    for call in calls:
        with pytest.raises(polyak.MismatchError, match=f"ranks ask for different things, this one for {name}"):
            call()
    with pytest.raises(polyak.MismatchError, match=r"this one for ema, (torch\.bfloat16|None)"):
        average["ema"].export(path, dtype=torch.bfloat16 if own else None)
    with pytest.raises(polyak.MismatchError, match=r"this one for (report\(\)|ema)"):
        (average.report if own else average["ema"].weights)()
    assert not path.exists()
    assert not sharing.is_swapped
    assert zoo.bit_equal(shared.state_dict(), kept)
