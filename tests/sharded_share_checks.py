"""`shard_over`: each data-parallel rank keeps its share of the averages, and all together have what one process has."""

import copy
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import polyak
import sharded_zoo
import zoo
from polyak import gathering
from polyak.kernels.native import library
from ranks import on
from sharded_zoo import PROFILES, make, mesh_of, shard

MODES = [{}, {"compensated": True}, {"dtype": torch.bfloat16, "seed": 3}, {"dtype": torch.float64}]


class Odd(nn.Module):
    """A scalar, an empty tensor, fewer rows than ranks, one that is channels-last, one that is transposed, a tie, and
    all kinds of dtypes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.few_rows = nn.Parameter(torch.randn(3, 50))
        self.few_of_all = nn.Parameter(torch.randn(2, 3, 2))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.transposed = nn.Parameter(torch.randn(6, 7).t())
        self.gaps = nn.Parameter(torch.randn(6, 8)[:, ::2])
        self.bfloat = nn.Parameter(torch.randn(9, 4).bfloat16())
        self.short = nn.Parameter(torch.randn(8).half())
        self.wide = nn.Parameter(torch.randn(4, 4).double())
        self.pairs = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.one = nn.Linear(4, 6)
        self.other = nn.Linear(4, 6)
        self.other.weight = self.one.weight
        self.register_buffer("count", torch.tensor(0))


def same_on_all(model):
    """The model and its twin in one process, with the same numbers on every rank."""
    torch.manual_seed(0)
    model, twin = model(), model()
    twin.load_state_dict(model.state_dict())
    return model, twin


@torch.no_grad()
def drift(seed, *models):
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]):
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
                noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else 1
                tensor.add_(torch.as_tensor(noise).to(tensor.dtype))


def check_swap(average, twin_average, model, twin, name):
    raw = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with average[name].swapped(), twin_average[name].swapped():
        assert zoo.bit_equal(model.state_dict(), twin.state_dict())
        assert zoo.bit_equal(average.raw_weights(), raw)
        assert zoo.bit_equal(average[name].weights(), twin_average[name].weights())
    assert zoo.bit_equal(model.state_dict(), raw)


def check_shares_are_one_process(models, modes):
    world = distributed.group.WORLD
    for model_class in models:
        for options in modes:
            model, twin = same_on_all(model_class)
            average = polyak.WeightAverage(model, PROFILES, shard_over=world, **options)
            reference = polyak.WeightAverage(twin, PROFILES, **options)
            for step in range(2):
                drift(step, model, twin)
                average.update(), reference.update()
                for name in PROFILES:
                    assert zoo.bit_equal(average[name].weights(), reference[name].weights()), name
                check_swap(average, reference, model, twin, "ema")
            assert zoo.bit_equal(average["power"].module().state_dict(), reference["power"].module().state_dict())
            average["ema"].write_back(), reference["ema"].write_back()
            assert zoo.bit_equal(model.state_dict(), twin.state_dict())
            average.check_in_sync()


@on(4)
def shares_of_four_are_one_process(folder):
    check_shares_are_one_process([Odd], MODES)


@on(3)
def shares_of_three_are_one_process(folder):
    check_shares_are_one_process([Odd], MODES[:3])


@on(2)
def shares_of_two_are_one_process(folder):
    check_shares_are_one_process([Odd, zoo.batchnorm], MODES[:3])


@on(1)
def the_share_of_one_is_everything(folder):
    check_shares_are_one_process([Odd], MODES[:3])


@on(4)
def a_share_is_a_quarter(folder):
    model, _ = same_on_all(lambda: nn.Sequential(nn.Embedding(64, 12), nn.Linear(12, 32), nn.BatchNorm1d(32)))
    for options, num_bytes in (({}, 4), ({"compensated": True}, 6), ({"dtype": torch.bfloat16}, 2)):
        average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD, **options)
        sizes = {entry.name: entry.num_bytes for entry in average.report().entries}
        for name, parameter in model.named_parameters():
            assert sizes[name] == num_bytes * parameter.numel() / 4, name
        assert sizes["2.running_mean"] == num_bytes * 32
        averages = next(iter(average.state_dict()["averages"].values()))["average"]
        assert averages["0.weight"].to_local().shape == (16, 12)
        assert averages["0.weight"].shape == (64, 12)
        assert not isinstance(averages["2.running_mean"], DTensor)


@on(4)
def shares_of_a_sharded_model_are_one_process(folder):
    for options in MODES[:3]:
        model, twin = make()
        mesh = mesh_of(2, 2)
        shard(model, mesh)
        average = polyak.WeightAverage(model, PROFILES, shard_over=mesh["outer"], **options)
        without = polyak.WeightAverage(model, PROFILES, **options)
        assert average.report().num_bytes < 0.7 * without.report().num_bytes
        mirror = sharded_zoo.Mirror(twin, **options)
        for step in range(2):
            sharded_zoo.drift(model, torch.Generator().manual_seed(step))
            average.update(), mirror.update(model), without.update()
            mirror.check(average)
        raw = sharded_zoo.whole(model)
        with average["ema"].swapped():
            inside = {name: tensor.to(raw[name].dtype) for name, tensor in mirror.average["ema"].weights().items()}
            assert zoo.bit_equal(sharded_zoo.whole(model), inside)
            assert zoo.bit_equal(average.raw_weights(), raw)
            model.eval()(torch.arange(11))
        assert zoo.bit_equal({**sharded_zoo.whole(model), "seen": raw["seen"]}, raw)
        found, wanted = average.report().averages, without.report().averages
        assert [each.distance for each in found] == pytest.approx([each.distance for each in wanted], rel=1e-12)


@on(4)
def no_message_in_updates(folder):
    model, _ = same_on_all(zoo.mlp)
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    with CommDebugMode() as counter:
        for step in range(3):
            drift(step, model)
            average.update()
        average.state_dict()
        average.load_state_dict(average.state_dict())
    assert counter.get_total_counts() == 0
    with CommDebugMode() as counter, average.swapped():
        pass
    assert counter.get_total_counts() > 0


@on(4)
def training_with_validation_is_training_without(folder):
    finals = []
    for validate in (False, True):
        torch.manual_seed(0)
        bare = zoo.mlp()
        model = nn.parallel.DistributedDataParallel(bare)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        average = polyak.WeightAverage(model, PROFILES, shard_over=distributed.group.WORLD)
        generator = torch.Generator().manual_seed(distributed.get_rank())
        for _ in range(5):
            model(torch.randn(4, 6, generator=generator)).square().mean().backward()
            optimizer.step(), optimizer.zero_grad(), average.update()
            if validate:
                inside = average["ema"].weights()
                with average["ema"].swapped(), torch.no_grad():
                    assert zoo.bit_equal(bare.state_dict(), inside)
                    model(torch.ones(1, 6))
        finals.append([bare.state_dict(), *(average[name].weights() for name in PROFILES)])
    assert all(map(zoo.bit_equal, *finals))


def _advance(model, average, *, first, steps):
    for step in range(first, first + steps):
        sharded_zoo.drift(model, torch.Generator().manual_seed(step))
        average.update()


@on(4)
def saved_by_four_that_share(folder):
    for number, options in enumerate(MODES[:3]):
        model, twin = make()
        average = polyak.WeightAverage(model, PROFILES, shard_over=distributed.group.WORLD, **options)
        _advance(model, average, first=0, steps=3)
        checkpoint.save({"average": average}, checkpoint_id=folder / f"shares-{number}")
        reference = polyak.WeightAverage(twin, PROFILES, **options)
        _advance(twin, reference, first=0, steps=6)
        torch.save(reference["ema"].weights(), folder / f"shares-{number}-{distributed.get_rank()}.pt")
        distributed.barrier()
        mesh = mesh_of(2, 2)
        _resume(folder, number, lambda model: {"shard_over": distributed.group.WORLD})
        _resume(folder, number, lambda model, mesh=mesh: [shard(model, mesh), {"shard_over": mesh["outer"]}][1])
        _resume(folder, number, lambda model, mesh=mesh: [shard(model, mesh["outer"]), {}][1])


def _resume(folder, number, prepare):
    model, _ = make()
    average = polyak.WeightAverage(model, PROFILES, **MODES[number], **prepare(model))
    # What was trained comes to the same in each layout.
    for step in range(3):
        sharded_zoo.drift(model, torch.Generator().manual_seed(step))
    average.update()
    checkpoint.load({"average": average}, checkpoint_id=folder / f"shares-{number}")
    assert average.num_updates == 3
    _advance(model, average, first=3, steps=3)
    assert zoo.bit_equal(average["ema"].weights(), torch.load(folder / f"shares-{number}-0.pt"))


@on(2)
def goes_on_with_two_that_share(folder):
    for number in range(3):
        _resume(folder, number, lambda model: {"shard_over": distributed.group.WORLD})


@on(1)
def goes_on_alone(folder):
    for number in range(3):
        _resume(folder, number, lambda model: {})


@on(4)
def one_writes_the_export_of_all(folder):
    model, twin = same_on_all(Odd)
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    reference = polyak.WeightAverage(twin)
    drift(0, model, twin)
    average.update(), reference.update()
    average.export(folder / "shares.safetensors", dtype=torch.float32)
    reference.export(folder / f"alone-{distributed.get_rank()}.safetensors", dtype=torch.float32)
    alone = load_file(folder / f"alone-{distributed.get_rank()}.safetensors")
    assert zoo.bit_equal(load_file(folder / "shares.safetensors"), alone)


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


@on(4)
def slices_with_gaps_go_through_the_fastest_kernel(folder):
    model = nn.Linear(50, 3)  # fewer rows than ranks: a slice has a gap after each
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    if library() is not None:
        assert str(average.plan).startswith("native: 2 tensors")


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
def messages_are_bounded(folder):
    model, twin = same_on_all(Odd)
    sizes = []

    def all_gather(received, sent, **options):
        sizes.append((received.numel(), sent.numel()))
        return kept(received, sent, **options)

    kept = gathering._all_gather
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "_MESSAGE_BYTES", 64)
        patch.setattr(gathering, "_LEAST_BYTES", 16)
        patch.setattr(gathering, "_all_gather", all_gather)
        average = polyak.WeightAverage(model, PROFILES, shard_over=distributed.group.WORLD)
        reference = polyak.WeightAverage(twin, PROFILES)
        drift(0, model, twin)
        average.update(), reference.update()
        with average["ema"].swapped(), reference["ema"].swapped():
            assert zoo.bit_equal(model.state_dict(), twin.state_dict())
    assert len(sizes) > 40
    assert max(sizes) == (64, 16)


@on(4)
def ranks_leave_out_the_same_updates(folder):
    model, twin = same_on_all(zoo.mlp)
    average = polyak.WeightAverage(model, nonfinite="skip", shard_over=distributed.group.WORLD)
    reference = polyak.WeightAverage(twin, nonfinite="skip")
    for step in range(4):
        drift(step, model, twin)
        with torch.no_grad():
            # In the share of one rank.
            model[0].weight[0, 0] = twin[0].weight[0, 0] = torch.nan if step == 1 else 1.0
        average.update(), reference.update()
    assert average.num_updates == reference.num_updates == 3
    assert zoo.bit_equal(average.weights(), reference.weights())


@on(4)
def a_changed_model_is_followed(folder):
    model, twin = same_on_all(zoo.mlp)
    world = distributed.group.WORLD
    average, reference = polyak.WeightAverage(model, shard_over=world), polyak.WeightAverage(twin)
    drift(0, model, twin)
    average.update(), reference.update()
    torch.manual_seed(1)
    added = nn.Linear(2, 9)
    model.append(added)
    twin.append(nn.Linear(2, 9)).load_state_dict(model.state_dict())
    average.adapt(), reference.adapt()
    drift(1, model, twin)
    average.update(), reference.update()
    assert zoo.bit_equal(average.weights(), reference.weights())


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
        with pytest.raises(polyak.StateError, match="cannot be pickled or copied, for the ranks cannot"):
            call(average)
    for mesh, over in ((mesh_of(4), world), (mesh_of(2, 2), None), (mesh_of(2, 2), world)):
        sharded, _ = make()
        shard(sharded, mesh)
        with pytest.raises(polyak.StateError, match=r"shard_over: '.*' is sharded as .* not replicated over the"):
            polyak.WeightAverage(sharded, shard_over=mesh["inner"] if over is None else over)


@on(4)
def ranks_may_be_given_in_any_order(folder):
    for options in MODES[:3]:
        model, twin = same_on_all(Odd)
        average = polyak.WeightAverage(model, shard_over=DeviceMesh("cpu", torch.tensor([3, 1, 0, 2])), **options)
        reference = polyak.WeightAverage(twin, **options)
        drift(0, model, twin)
        average.update(), reference.update()
        check_swap(average, reference, model, twin, "average")
    checkpoint.save({"average": average}, checkpoint_id=folder / "order")
    assert zoo.bit_equal(average.weights(), reference.weights())
    found, wanted = polyak.read(folder / "order").average, reference.weights()
    assert "conv.weight" in found
    assert zoo.bit_equal(found, {name: wanted[name] for name in found})
    sharded = fully_shard(nn.Linear(3, 9), mesh=_unordered())
    with pytest.raises(polyak.StateError, match=r"shard_over: 'weight' is sharded over a mesh of the ranks \[\[3, 1\]"):
        polyak.WeightAverage(sharded, shard_over=_unordered()["outer"])


def _unordered():
    return DeviceMesh("cpu", torch.tensor([[3, 1], [0, 2]]), mesh_dim_names=("outer", "inner"))


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

    for place in ("gathering._all_gather", "collectives._reduce"):
        model, _ = same_on_all(zoo.mlp)
        average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
        average.update()
        drift(1, model)
        raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        interrupted = False
        with monkeypatch.context() as patch:
            patch.setattr("polyak.gathering._MESSAGE_BYTES", 64)
            patch.setattr("polyak.gathering._LEAST_BYTES", 16)
            module = getattr(polyak, place.partition(".")[0])
            call = getattr(module, place.partition(".")[2])

            def first(*args, call=call, patch=patch, place=place, **kwargs):
                patch.setattr(f"polyak.{place}", call)
                late()
                return call(*args, **kwargs)

            try:
                with average.swapped():
                    patch.setattr(f"polyak.{place}", first)
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
def a_tensor_of_another_shape_begins_anew_on_all(folder):
    profile = polyak.Exponential(0.9)
    for num_rows in (7, 9):
        model, twin = same_on_all(lambda: nn.Sequential(nn.Embedding(8, 3), nn.Linear(3, 3)))
        average = polyak.WeightAverage(model, profile, shard_over=distributed.group.WORLD)
        reference = polyak.WeightAverage(twin, profile)
        for step in range(3):
            drift(step, model, twin)
            average.update(), reference.update()
        rows = torch.randn(num_rows, 3)
        model[0].weight, twin[0].weight = nn.Parameter(rows.clone()), nn.Parameter(rows.clone())
        average.adapt(), reference.adapt()
        assert zoo.bit_equal(average.weights(), reference.weights())
    model[1].weight = nn.Parameter(model[1].weight.detach().t().contiguous().t())
    with pytest.raises(polyak.StateError, match=r"'1\.weight' lie otherwise in memory now, and would be shared along"):
        average.adapt()


@on(4)
def uneven_parts_of_a_mesh_of_three_dimensions_are_shared(folder):
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    model, twin = same_on_all(lambda: nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7)))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["replicate", "shard"])
    average = polyak.WeightAverage(model, PROFILES, shard_over=mesh["replicate"])
    reference = polyak.WeightAverage(twin, PROFILES)
    for step in range(2):
        for each in (model, twin):
            sharded_zoo.drift(each, torch.Generator().manual_seed(step))
        average.update(), reference.update()
    assert zoo.bit_equal(average["ema"].weights(), reference["ema"].weights())
    raw = sharded_zoo.whole(model)
    with average["ema"].swapped():
        assert zoo.bit_equal(sharded_zoo.whole(model), reference["ema"].weights())
    assert zoo.bit_equal(sharded_zoo.whole(model), raw)
