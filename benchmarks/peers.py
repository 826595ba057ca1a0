"""The libraries that people use today, but for timm and Lightning, which have files of their own.

Each is configured so that every call averages with the same constant decay.
"""

from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.contender import DECAY, Running, pairs_by_every_name, pairs_by_name, pairs_in_order
from benchmarks.seed import SeedFormula

# Each library is imported where it is needed: some take seconds, and not every run needs them all.


def averaged_model(model: nn.Module) -> Running:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return Running(
        lambda: average.update_parameters(model),
        lambda: pairs_in_order(list(average.module.parameters()), model),
    )


def ema_pytorch_foreach(model: nn.Module) -> Running:
    return _ema_pytorch(model)


def ema_pytorch_float32(model: nn.Module) -> Running:
    return _ema_pytorch(model, ema_model=deepcopy(model).float(), coerce_dtype=True)


def _ema_pytorch(model: nn.Module, **options: object) -> Running:
    import ema_pytorch

    average = ema_pytorch.EMA(
        model,
        beta=DECAY,
        min_value=DECAY,  # no warm-up
        update_after_step=0,
        update_every=1,
        include_online_model=False,
        use_foreach=True,
        **options,
    )
    return Running(average.update, lambda: pairs_by_name(average.ema_model.state_dict(), model))


def torch_ema_loop(model: nn.Module) -> Running:
    return _torch_ema(model)


def torch_ema_float32(model: nn.Module) -> Running:
    return _torch_ema(model, dtype=torch.float32)


def _torch_ema(model: nn.Module, dtype: torch.dtype | None = None) -> Running:
    import torch_ema

    average = torch_ema.ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)
    if dtype is not None:
        average.to(dtype=dtype)
    return Running(average.update, lambda: pairs_in_order(average.shadow_params, model))


def diffusers_foreach(model: nn.Module) -> Running:
    return _diffusers(model)


def diffusers_float32(model: nn.Module) -> Running:
    return _diffusers(model, dtype=torch.float32)


def _diffusers(model: nn.Module, dtype: torch.dtype | None = None) -> Running:
    from diffusers.training_utils import EMAModel

    # The first call copies; from then on `min_decay` leaves its ramp no room.
    average = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=True)
    if dtype is not None:
        average.to(dtype=dtype)
    return Running(lambda: average.step(model.parameters()), lambda: pairs_in_order(average.shadow_params, model))


def seed_formula(model: nn.Module) -> Running:
    average = SeedFormula(model, decay=DECAY)
    return Running(lambda: average.update(model), lambda: pairs_by_every_name(average.ema.state_dict(), model))
