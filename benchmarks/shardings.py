"""Which averages of models on several ranks are compared with which. A further comparison is one more row.

Both are on the same rank, and move as many bytes there, or N times as many where the other is not divided.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polyak
from benchmarks.contender import DECAY
from benchmarks.shapes import Shape
from polyak.ranks.sharding import local


@dataclass(frozen=True)
class Sides:
    """Two averages that must end as the same numbers.

    Attributes:
        own: what is measured.
        other: what it is compared with.
        models: those that they average.
        parts: the tensors of an average that are the same in both.
    """

    own: polyak.WeightAverage
    other: polyak.WeightAverage
    models: Iterable[nn.Module]
    parts: Callable[[polyak.WeightAverage], dict[str, Tensor]]

    @torch.no_grad()
    def move(self) -> None:
        """Takes the models away from their averages, so that these must follow."""
        for model in self.models:
            for parameter in model.parameters():
                local(parameter).add_(1)

    def check(self) -> None:
        own, other = self.parts(self.own), self.parts(self.other)
        apart = [name for name, tensor in own.items() if not torch.equal(tensor, other[name])]
        if apart or own.keys() != other.keys():
            raise RuntimeError(f"the two averages are not the same, beginning with {(apart or ['their names'])[0]!r}")


@dataclass(frozen=True)
class Comparison:
    """One row.

    Attributes:
        name: unique.
        title: for tables, both sides.
        build: sets both to work on a model.
        most_time: what is allowed of the other's time.
        most_bytes: what is allowed of the other's memory.
        divided: whether the other has N times as much to do, and its share is what counts.
    """

    name: str
    title: str
    build: Callable[[Shape, torch.device], Sides]
    most_time: float
    most_bytes: float
    divided: bool = False


def average_of(model: nn.Module, **options: Any) -> polyak.WeightAverage:
    return polyak.WeightAverage(model, polyak.Exponential(DECAY), **options)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shards each module of a list by itself, as layers usually are, and then the rest."""
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def of_parts(plain: nn.Module, sharded: nn.Module) -> nn.Module:
    """Gives a plain model the parts of a sharded one that are here, as tensors of its own, tied as they are there.

    A part without elements is left out, for a plain vector without any is taken for what ZeRO-3 leaves.
    """
    parts: dict[Tensor, nn.Parameter | None] = {}
    for name, parameter in sharded.named_parameters(remove_duplicate=False):
        if parameter not in parts:
            part = local(parameter).detach().clone()
            parts[parameter] = nn.Parameter(part) if part.numel() else None
        owner, _, attribute = name.rpartition(".")
        plain.get_submodule(owner)._parameters[attribute] = parts[parameter]
    return plain


def parts_here(average: polyak.WeightAverage) -> dict[str, Tensor]:
    (profile,) = average.profiles
    return {name: tensor for name, tensor in average._core.store.tensors(profile).items() if tensor.numel()}


def fsdp2(shape: Shape, device: torch.device) -> Sides:
    sharded = shard(shape.model(device=device), device)
    plain = of_parts(shape.model(device=device), sharded)
    return Sides(average_of(sharded), average_of(plain), (sharded, plain), parts_here)


def divided(shape: Shape, device: torch.device) -> Sides:
    """One replicated model, with an average that its ranks share and one that each has whole."""
    model = shape.model(device=device)
    own = average_of(model, shard_over=distributed.group.WORLD)
    return Sides(own, average_of(model), (model,), lambda average: average.weights())


COMPARISONS = (
    Comparison("fsdp2", "FSDP2; its parts, plain", fsdp2, most_time=1.1, most_bytes=1.0),
    Comparison(
        "shard_over",
        "shard_over; 1/N of whole ones",
        divided,
        most_time=1.2,
        most_bytes=1.2,
        divided=True,
    ),
)
