"""Sharded models for the checks on several ranks, and what they are compared with."""

import copy

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import polyak
import zoo

PROFILES = {"power": polyak.Power(relative_std=0.1), "ema": polyak.Exponential(0.9)}


class Net(nn.Module):
    """Uneven and empty shards on 4 ranks, a tie, a scalar's worth of buffers, and parameters of the root itself."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.ones(8))
        self.back = nn.Linear(3, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, tokens):
        self.seen += 1
        hidden = self.norm(self.first(self.embedding(tokens) * self.gain))
        return self.head(self.back(self.second(hidden))).clone()  # no view, which fully_shard warns of


def mesh_of(*shape):
    names = ("outer", "inner")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def shard(model, mesh=None, **options):
    """Shards some layers by themselves and the rest with the root, which stays whole after a pass without gradients."""
    mesh = mesh or mesh_of(distributed.get_world_size())
    for layer in (model.first, model.second, model.back):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def train(model, optimizer, *, seed):
    """One step, on a batch of this rank's own."""
    generator = torch.Generator().manual_seed(seed * 100 + distributed.get_rank())
    tokens = torch.randint(11, (6,), generator=generator)
    loss = model(tokens).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    for name, buffer in model.named_buffers():
        # As FSDP's users do it: statistics of the ranks are made equal by hand.
        if buffer.is_floating_point() and not isinstance(buffer, DTensor):
            distributed.all_reduce(buffer)
            buffer /= distributed.get_world_size()
        del name
    return loss


@torch.no_grad()
def drift(model, generator):
    """Moves every tensor by the same numbers, whole, however it is sharded."""
    for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.1
            here = polyak.ranks.sharding.sharding_of(tensor)
            polyak.ranks.sharding.local(tensor).add_(noise if here is None else here.cut(noise))


def whole(model):
    """The model's tensors, put together, as a dictionary."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in model.state_dict().items()
    }


class Mirror:
    """The same model and averages in one process, which is shown the whole weights at each step."""

    def __init__(self, model, profiles=PROFILES, **options):
        self.model = model
        self.average = polyak.WeightAverage(model, profiles, **options)

    def update(self, sharded):
        self.model.load_state_dict(whole(sharded))
        self.average.update()

    def check(self, average):
        """Compares every average and the second terms, bit for bit."""
        for name in self.average.profiles:
            assert zoo.bit_equal(average[name].weights(), self.average[name].weights()), name
        if "seconds" in self.average.state_dict():
            assert zoo.bit_equal(seconds_of(average), seconds_of(self.average))


def seconds_of(average):
    (found,) = average.state_dict()["seconds"].values()
    return {
        f"{profile}.{name}": tensor.int().full_tensor() if isinstance(tensor, DTensor) else tensor.int()
        for profile, tensors in found.items()
        for name, tensor in tensors.items()
    }


def make(seed=0):
    """A model, and its twin in one process."""
    torch.manual_seed(seed)
    model = Net()
    return model, copy.deepcopy(model)
