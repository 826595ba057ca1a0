"""Files to convert, each of one library, with what is in them; and those files of timm that need no torchvision."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import benchmarks.timm_file
import polyak
import zoo

DECAY = 0.9
NUM_UPDATES = 3


@dataclass
class Case:
    """A file, and what is in it: the average and the raw weights by name, and the model that was trained."""

    path: Path
    average: dict
    raw: dict | None
    model: nn.Module


def train(model, update, *, times=NUM_UPDATES):
    """Changes the weights of a model, as training does, and averages them each time."""
    for _ in range(times):
        zoo.drift(model)
        update()


def timm(folder, model=None):
    """As `CheckpointSaver` writes it."""
    model = zoo.batchnorm() if model is None else model
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    train(model, lambda: average.update_parameters(model))
    weights = {"state_dict": model.state_dict(), "state_dict_ema": average.module.state_dict()}
    torch.save({"epoch": 7, "arch": "net", "version": 2, **weights}, folder / "last.pth.tar")
    return Case(folder / "last.pth.tar", average.module.state_dict(), model.state_dict(), model)


def torch_average(folder):
    model = zoo.batchnorm()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    train(model, lambda: average.update_parameters(model))
    torch.save(average.state_dict(), folder / "swa.pth")
    return Case(folder / "swa.pth", average.module.state_dict(), None, model)


def ema_pytorch(folder, model=None):
    model = zoo.batchnorm() if model is None else model
    average = pytest.importorskip("ema_pytorch").EMA(model, beta=DECAY, update_after_step=0, update_every=1)
    train(model, average.update)
    torch.save(average.state_dict(), folder / "ema.pt")
    return Case(folder / "ema.pt", average.ema_model.state_dict(), model.state_dict(), model)


def export(folder):
    model = zoo.batchnorm()
    average = polyak.WeightAverage(model, polyak.Exponential(DECAY))
    train(model, average.update)
    average.export(folder / "ema.safetensors")
    return Case(folder / "ema.safetensors", average.weights(), None, model)


def lightning(folder):
    """As `EMAWeightAveraging` writes it."""
    case = timm(folder)
    content = {
        "state_dict": case.average,
        "current_model_state": case.raw,
        "averaging_state": {"n_averaged": torch.tensor(NUM_UPDATES)},
        "callbacks": {"EMAWeightAveraging": {"latest_update_step": NUM_UPDATES}},
        "epoch": 1,
        "global_step": NUM_UPDATES,
    }
    torch.save(content, folder / "last.ckpt")
    return Case(folder / "last.ckpt", case.average, case.raw, case.model)


def torch_ema(folder, model=None):
    """With a model that has no buffers, for none are averaged."""
    model = zoo.TiedTransformer() if model is None else model
    average = pytest.importorskip("torch_ema").ExponentialMovingAverage(model.parameters(), DECAY)
    train(model, average.update)
    average.store()
    torch.save(average.state_dict(), folder / "shadow.pt")
    named = {name: model.get_parameter(name) for name in model.state_dict()}
    shadow = {id(parameter): kept for parameter, kept in zip(model.parameters(), average.shadow_params, strict=True)}
    kept = {name: shadow[id(parameter)] for name, parameter in named.items()}
    return Case(folder / "shadow.pt", kept, model.state_dict(), model)


CASES = {case.__name__: case for case in (timm, torch_average, ema_pytorch, export, lightning, torch_ema)}
TARGETS = {
    "safetensors": "out.safetensors",
    "plain": "out.pth",
    "huggingface": "model_folder",
    "timm": "out.pth.tar",
    "torch": "out.pt",
    "ema-pytorch": "out_ema.pt",
    "torch-ema": "out_shadow.pt",
    "diffusers": "unet_ema",
    "lightning": "out.ckpt",
}


def config(folder):
    (folder / "config.json").write_text(json.dumps({"_class_name": "Net", "width": 4}))
    return folder / "config.json"


def timm_file(*parts):
    """A file of timm by itself: `import timm` needs torchvision, which has nothing to do with averages."""
    if find_spec("timm") is None:
        pytest.skip("timm is not installed; `make test` installs it")
    return benchmarks.timm_file.timm_file(*parts)
