"""Who is timed. A new contender is one more row of CONTENDERS, with the function that builds it.

Each one keeps averages of its own, and is configured so that every call averages with the same constant decay.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import ema_pytorch
import torch
import torch_ema
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak
from benchmarks.seed import SeedFormula

DECAY = 0.9999
WEIGHT = 1 - DECAY


class Kind(Enum):
    OURS = "ours"
    PEER = "peer"
    SEED = "seed"
    REFERENCE = "reference"
    LIMIT = "limit"


@dataclass(frozen=True)
class Pair:
    """An average, the tensor that it averages, and how often one update averages it."""

    average: Tensor
    source: Tensor
    times: int = 1


@dataclass(frozen=True)
class Running:
    """A contender at work on one model: what is timed, and what is checked afterwards."""

    update: Callable[[], object]
    pairs: Callable[[], list[Pair]]


@dataclass(frozen=True)
class Contender:
    name: str
    kind: Kind
    build: Callable[[nn.Module], Running]


def floating_entries(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def once_each(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of tied names only the first."""
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_names.setdefault(tensor.data_ptr(), name)
    return {name: tensors[name] for name in first_names.values()}


def pairs_by_name(averages: dict[str, Tensor], model: nn.Module) -> list[Pair]:
    return [Pair(averages[name], source) for name, source in once_each(floating_entries(model)).items()]


def weight_average(model: nn.Module) -> Running:
    average = polyak.WeightAverage(model, polyak.Exponential(DECAY))
    return Running(average.update, lambda: pairs_by_name(average.weights(), model))


def model_ema(model: nn.Module) -> Running:
    average = polyak.ModelEma(model, decay=DECAY)
    return Running(lambda: average.update(model), lambda: pairs_by_name(average.ema.state_dict(), model))


def averaged_model(model: nn.Module) -> Running:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def pairs() -> list[Pair]:
        averages = dict(average.module.named_parameters())
        return [Pair(averages[name].detach(), source.detach()) for name, source in model.named_parameters()]

    return Running(lambda: average.update_parameters(model), pairs)


def ema_pytorch_foreach(model: nn.Module) -> Running:
    average = ema_pytorch.EMA(
        model,
        beta=DECAY,
        min_value=DECAY,  # no warm-up
        update_after_step=0,
        update_every=1,
        include_online_model=False,
        use_foreach=True,
    )
    return Running(average.update, lambda: pairs_by_name(average.ema_model.state_dict(), model))


def torch_ema_loop(model: nn.Module) -> Running:
    average = torch_ema.ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)

    def pairs() -> list[Pair]:
        sources = (parameter.detach() for parameter in model.parameters())
        return [Pair(*both) for both in zip(average.shadow_params, sources, strict=True)]

    return Running(average.update, pairs)


def seed_formula(model: nn.Module) -> Running:
    average = SeedFormula(model, decay=DECAY)

    def pairs() -> list[Pair]:
        sources = floating_entries(model)
        names = Counter(source.data_ptr() for source in sources.values())
        averages = average.ema.state_dict()
        # Its loop runs over names: what has two names is averaged twice.
        return [Pair(averages[name], source, names[source.data_ptr()]) for name, source in once_each(sources).items()]

    return Running(lambda: average.update(model), pairs)


def cached_foreach(model: nn.Module) -> Running:
    """The lists made once, nothing checked: what a loop written by hand for one model could do."""
    entries = once_each(model.state_dict())
    sources = [tensor for tensor in entries.values() if tensor.is_floating_point()]
    averages = [source.clone() for source in sources]
    copied = [tensor for tensor in entries.values() if not tensor.is_floating_point()]
    copies = [source.clone() for source in copied]

    def update() -> None:
        torch._foreach_lerp_(averages, sources, WEIGHT)
        if copies:
            torch._foreach_copy_(copies, copied)

    return Running(update, lambda: [Pair(*both) for both in zip(averages, sources, strict=True)])


def flat_lerp(model: nn.Module) -> Running:
    """The same bytes in one tensor a dtype: as fast as memory allows."""
    elements: Counter[torch.dtype] = Counter()
    for tensor in once_each(floating_entries(model)).values():
        elements[tensor.dtype] += tensor.numel()
    pairs = [
        Pair(torch.zeros(count, dtype=dtype), torch.zeros(count, dtype=dtype)) for dtype, count in elements.items()
    ]

    def update() -> None:
        for pair in pairs:
            pair.average.lerp_(pair.source, WEIGHT)

    return Running(update, lambda: pairs)


CONTENDERS = (
    Contender("polyak.WeightAverage", Kind.OURS, weight_average),
    Contender("polyak.ModelEma", Kind.OURS, model_ema),
    Contender("torch AveragedModel", Kind.PEER, averaged_model),
    Contender("ema-pytorch", Kind.PEER, ema_pytorch_foreach),
    Contender("torch-ema", Kind.PEER, torch_ema_loop),
    Contender("timm ModelEma's formula", Kind.SEED, seed_formula),
    Contender("cached foreach", Kind.REFERENCE, cached_foreach),
    Contender("flat lerp", Kind.LIMIT, flat_lerp),
)
