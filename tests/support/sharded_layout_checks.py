"""Tensor parallel, two dimensions of ranks, and mixtures with plain and replicated tensors, against one process."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import polyak
import sharded_zoo
import zoo
from ranks import on
from sharded_zoo import PROFILES, Mirror, mesh_of

MODES = [{}, {"compensated": True}, {"dtype": torch.bfloat16, "seed": 5}, {"dtype": torch.float16}]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, inputs):
        return self.norm(self.down(self.up(inputs).relu())) * self.scale


def make():
    torch.manual_seed(0)
    return Mlp()


def tensor_parallel(model, mesh):
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def both(model):
    """Tensor parallel inside, sharded over data-parallel ranks outside; the norm and the rest with the root."""
    mesh = mesh_of(2, 2)
    tensor_parallel(model, mesh["inner"])
    fully_shard(model.up, mesh=mesh["outer"])
    fully_shard(model.down, mesh=mesh["outer"])
    return fully_shard(model, mesh=mesh["outer"])


def replicated(model):
    """HSDP: shards are replicated over the outer dimension."""
    return fully_shard(model, mesh=mesh_of(2, 2))


def second_dimension(model):
    return fully_shard(model, mesh=mesh_of(4), shard_placement_fn=_widest)


def _widest(parameter):
    return Shard(1 if parameter.dim() == 2 and parameter.shape[1] % 4 == 0 else 0)


LAYOUTS = {
    "tensor parallel": lambda model: tensor_parallel(model, mesh_of(4)),
    "both": both,
    "replicated": replicated,
    "second dimension": second_dimension,
}


@on(4)
def every_layout_is_one_process_in_every_mode(folder):
    for name, lay in LAYOUTS.items():
        for options in MODES:
            model = lay(make())
            average, mirror = polyak.WeightAverage(model, PROFILES, **options), Mirror(make(), **options)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
            for step in range(2):
                torch.manual_seed(step)
                model(torch.randn(4, 6)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                with CommDebugMode() as counter:
                    average.update()
                    with average["ema"].swapped():
                        pass
                assert counter.get_total_counts() == 0, name
                mirror.update(model)
                mirror.check(average)
            with average["ema"].swapped(), torch.no_grad():
                inside = model(torch.ones(4, 6))
            alone = mirror.model
            alone.load_state_dict(average["ema"].weights())
            torch.testing.assert_close(inside, alone(torch.ones(4, 6)).detach())


class Mixture(nn.Module):
    """Plain, replicated and sharded tensors side by side, of any number of dimensions, whole and by buffers."""

    def __init__(self, lay):
        super().__init__()
        torch.manual_seed(1)
        self.plain = nn.Parameter(torch.randn(3, 2))
        tensors = {
            "line": torch.randn(7),
            "scalar": torch.randn(()),
            "matrix": torch.randn(5, 6),
            "cube": torch.randn(3, 6, 5),
            "images": torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last),
            "few": torch.randn(1, 4),
            "complex": torch.randn(6, 3, dtype=torch.complex64),
            "short": torch.randn(6, 6).bfloat16(),
        }
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(lay(name, tensor)))
        self.register_buffer("statistics", lay("matrix", torch.randn(5, 6)))
        self.register_buffer("table", lay("matrix", torch.arange(30).view(5, 6)))


PLACEMENTS = [
    {"*": (Shard(0), Shard(0)), "scalar": (Replicate(), Replicate())},
    {"*": (Shard(0), Replicate()), "scalar": (Replicate(), Replicate())},
    {"*": (Shard(1), Shard(0)), "line": (Replicate(), Shard(0)), "scalar": (Replicate(), Replicate())},
    {"*": (Shard(1), Shard(1)), "line": (Shard(0), Replicate()), "scalar": (Replicate(), Replicate())},
    {
        "*": (Shard(0), Shard(0)),
        "cube": (Shard(2), Shard(1)),
        "images": (Shard(2), Shard(3)),
        "scalar": (Replicate(), Replicate()),
    },
]


@on(4)
def mixtures_are_one_process_in_every_mode(folder):
    mesh = mesh_of(2, 2)
    for placements in PLACEMENTS:
        for options in MODES:
            model = Mixture(lambda name, t, p=placements: distribute_tensor(t, mesh, p.get(name, p["*"])))
            alone = Mixture(lambda name, t: t)
            average, mirror = (
                polyak.WeightAverage(model, PROFILES, **options),
                polyak.WeightAverage(alone, PROFILES, **options),
            )
            for step in range(2):
                for each in (model, alone):
                    sharded_zoo.drift(each, torch.Generator().manual_seed(step))
                average.update()
                mirror.update()
                for name in PROFILES:
                    assert zoo.bit_equal(average[name].weights(), mirror[name].weights()), placements
            for each in (average, mirror):
                each["ema"].swap_in()
            assert zoo.bit_equal(sharded_zoo.whole(model), sharded_zoo.whole(alone))
            for each in (average, mirror):
                each["ema"].swap_out()
            assert zoo.bit_equal(sharded_zoo.whole(model), sharded_zoo.whole(alone))
            state = average.state_dict()["averages"]
            for tensors in next(iter(state.values())).values():
                for name, tensor in tensors.items():
                    source = dict(model.named_parameters()) | dict(model.named_buffers())
                    assert isinstance(tensor, DTensor) == isinstance(source[name], DTensor)
                    assert tensor.shape == source[name].shape
                    if isinstance(tensor, DTensor):
                        assert (tensor.stride(), tensor.placements) == (source[name].stride(), source[name].placements)


@on(4)
def sums_over_ranks_are_refused(folder):
    model = nn.Module()
    local = torch.ones(3)
    model.weight = nn.Parameter(DTensor.from_local(local, mesh_of(4), [Partial()]))
    with pytest.raises(polyak.StateError, match=r"'weight' is sharded as \(Partial\(sum\),\) .* redistribute it"):
        polyak.WeightAverage(model)


@on(4)
def ranks_outside_of_a_mesh_average_nothing_of_it(folder):
    mesh = polyak_mesh_of_two()
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.arange(6.0), mesh, [Shard(0)]))
    model.bias = nn.Parameter(torch.ones(2))
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    with torch.no_grad():
        model.weight._local_tensor.add_(2)
    average.update()
    if distributed.get_rank() < 2:
        assert average.weights()["weight"].tolist() == [1, 2, 3, 4, 5, 6]


def polyak_mesh_of_two():
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", [0, 1])


@on(4)
def parameters_of_one_module_may_lie_over_meshes_of_their_own(folder):
    common = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_common")
    if not hasattr(common, "ShardPlacementResult"):
        return  # an older torch, in which all parameters of a module lie over one mesh
    model, meshes = make(), (mesh_of(4), mesh_of(2, 2)["inner"])
    places = [common.ShardPlacementResult(Shard(0), common.FSDPMeshInfo(mesh, shard_mesh_dim=0)) for mesh in meshes]
    fully_shard(model, mesh=meshes[0], shard_placement_fn=lambda parameter: places[parameter is model.up.weight])
    average, mirror = polyak.WeightAverage(model, PROFILES), Mirror(make())
    for step in range(2):
        sharded_zoo.drift(model, torch.Generator().manual_seed(step))
        with torch.no_grad():
            model(torch.ones(4, 6))
        average.update(), mirror.update(model)
        mirror.check(average)
        raw = sharded_zoo.whole(model)
        with average["ema"].swapped(), torch.no_grad():
            inside = model(torch.ones(4, 6))
        with mirror.average["ema"].swapped(), torch.no_grad():
            torch.testing.assert_close(inside, mirror.model(torch.ones(4, 6)))
        assert zoo.bit_equal(sharded_zoo.whole(model), raw)
