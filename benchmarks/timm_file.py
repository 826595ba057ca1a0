"""timm's averages, from the one file of timm that has them, and other files of it by themselves.

`import timm` needs torchvision, which is large and has nothing to do with averages; the file alone needs torch.
"""

import functools
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from benchmarks.contender import DECAY, Running, pairs_by_every_name


@functools.cache
def timm_file(*parts: str) -> ModuleType:
    found = find_spec("timm")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("timm is not installed; `make bench` installs what the benchmarks compare with")
    path = Path(found.submodule_search_locations[0]).joinpath(*parts)
    specification = spec_from_file_location(f"timm_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def timm_averages() -> ModuleType:
    return timm_file("utils", "model_ema.py")


def model_ema(model: nn.Module) -> Running:
    average = timm_averages().ModelEma(model, decay=DECAY)
    return Running(lambda: average.update(model), lambda: pairs_by_every_name(average.ema.state_dict(), model))


def model_ema_v2(model: nn.Module) -> Running:
    average = timm_averages().ModelEmaV2(model, decay=DECAY)
    return Running(lambda: average.update(model), lambda: pairs_by_every_name(average.module.state_dict(), model))


def model_ema_v3(model: nn.Module) -> Running:
    """In the model's own dtype: with stochastic rounding where that is bfloat16."""
    average = timm_averages().ModelEmaV3(model, decay=DECAY)
    return Running(lambda: average.update(model), lambda: pairs_by_every_name(average.module.state_dict(), model))


def model_ema_v3_float32(model: nn.Module) -> Running:
    average = timm_averages().ModelEmaV3(model, decay=DECAY, dtype=torch.float32)
    return Running(lambda: average.update(model), lambda: pairs_by_every_name(average.module.state_dict(), model))
