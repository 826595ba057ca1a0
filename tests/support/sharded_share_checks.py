"""`shard_over`: each data-parallel rank keeps its share of the averages, and all together have what one process has."""

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
from polyak.kernels.native import library
from polyak.ranks import messages
from polyak.store import shares as gathering
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
def ranks_that_are_alike_say_so_in_one_message_a_dimension(folder, monkeypatch=pytest.MonkeyPatch):
    average = polyak.WeightAverage(same_on_all(zoo.mlp)[0], shard_over=distributed.group.WORLD)
    average.update()
    sent = []

    def count(*arguments, reduce=messages._reduce, **options):
        sent.append(arguments)
        return reduce(*arguments, **options)

    def messages_of(call):
        sent.clear()
        with monkeypatch.context() as patch:
            patch.setattr(messages, "_reduce", count)
            call()
        return len(sent)

    assert messages_of(average.weights) == 1
    # And whether all have the memory, and whether all end it alike; and whether the first rank could write.
    assert messages_of(average.swap_in) == 2
    assert messages_of(average.swap_out) == 1
    assert messages_of(lambda: average.export(folder / "few.safetensors")) == 2


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
def slices_with_gaps_go_through_the_fastest_kernel(folder):
    model = nn.Linear(50, 3)  # fewer rows than ranks: a slice has a gap after each
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    if library() is not None:
        assert str(average.plan).startswith("native: 2 tensors")


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
