"""What follows the training run whose averages are compared with float64: this library's modes, and the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak
from benchmarks.seed import SeedFormula
from benchmarks.timm_file import timm_averages


@dataclass(frozen=True)
class Follower:
    """Averages of one model with several decays. `averages` are flat, one a decay."""

    update: Callable[[], object]
    averages: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class FollowerRow:
    name: str
    build: Callable[[nn.Module, Sequence[float]], Follower]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def ours(**options: object) -> Callable[[nn.Module, Sequence[float]], Follower]:
    def build(model: nn.Module, decays: Sequence[float]) -> Follower:
        average = polyak.WeightAverage(model, {str(decay): polyak.Exponential(decay) for decay in decays}, **options)
        return Follower(
            average.update, lambda: [flat(list(average[name].weights().values())) for name in average.profiles]
        )

    return build


def one_a_decay(
    make: Callable[[nn.Module, float], tuple[Callable[[], object], Callable[[], Sequence[Tensor]]]],
) -> Callable[[nn.Module, Sequence[float]], Follower]:
    """For those that keep one average each: `make` gives what updates one, and its tensors."""

    def build(model: nn.Module, decays: Sequence[float]) -> Follower:
        made = [make(model, decay) for decay in decays]

        def update() -> None:
            for each, _ in made:
                each()

        return Follower(update, lambda: [flat(tensors()) for _, tensors in made])

    return build


Made = tuple[Callable[[], object], Callable[[], Sequence[Tensor]]]


def seed_formula(model: nn.Module, decay: float) -> Made:
    average = SeedFormula(model, decay=decay)
    return lambda: average.update(model), lambda: list(average.ema.parameters())


def averaged_model(model: nn.Module, decay: float) -> Made:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.n_averaged.fill_(1)  # the first update averages, too
    return lambda: average.update_parameters(model), lambda: list(average.module.parameters())


def timm_v3(dtype: torch.dtype | None) -> Callable[[nn.Module, float], Made]:
    def make(model: nn.Module, decay: float) -> Made:
        average = timm_averages().ModelEmaV3(model, decay=decay, dtype=dtype)
        return lambda: average.update(model), lambda: list(average.module.parameters())

    return make


def ema_pytorch_foreach(model: nn.Module, decay: float) -> Made:
    import ema_pytorch

    average = ema_pytorch.EMA(
        model,
        beta=decay,
        min_value=decay,
        update_after_step=-2,  # the first update averages, too
        update_every=1,
        include_online_model=False,
        use_foreach=True,
    )
    average.initted.fill_(True)
    return average.update, lambda: list(average.ema_model.parameters())


def nearest_bfloat16(model: nn.Module, decay: float) -> Made:
    """Averages that are rounded to nearest: what `model.to(torch.bfloat16)` and a loop of lerp_ give."""
    sources = [parameter.detach() for parameter in model.parameters()]
    averages = [source.to(torch.bfloat16) for source in sources]

    def update() -> None:
        torch._foreach_lerp_(averages, [source.to(torch.bfloat16) for source in sources], 1 - decay)

    return update, lambda: averages


PLAIN, COMPENSATED, STOCHASTIC = "polyak, float32", "polyak, compensated", "polyak, bfloat16 stochastic"

FOLLOWERS = (
    FollowerRow("polyak, float64", ours(dtype=torch.float64)),
    FollowerRow(COMPENSATED, ours(compensated=True)),
    FollowerRow(PLAIN, ours()),
    FollowerRow("polyak, float16 stochastic", ours(dtype=torch.float16)),
    FollowerRow(STOCHASTIC, ours(dtype=torch.bfloat16)),
    FollowerRow("torch AveragedModel, float32", one_a_decay(averaged_model)),
    FollowerRow("timm ModelEmaV3, float32", one_a_decay(timm_v3(None))),
    FollowerRow("ema-pytorch, float32", one_a_decay(ema_pytorch_foreach)),
    FollowerRow("the seed's formula, float32", one_a_decay(seed_formula)),
    FollowerRow("timm ModelEmaV3, bfloat16 stochastic", one_a_decay(timm_v3(torch.bfloat16))),
    FollowerRow("nearest bfloat16", one_a_decay(nearest_bfloat16)),
)
