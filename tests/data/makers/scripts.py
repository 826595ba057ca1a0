"""Files of libraries and research scripts that cannot be installed, from what they are known to write.

The averages are computed here, from the formulas; `about.json` says `"documented": true`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from makers.common import STEPS, case, copied, tiny, train, write


def _averaged(model: nn.Module, decay: float | Callable[[int], float] = 0.9) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Trains the model, and gives a copy whose parameters are averaged and whose buffers are the last."""
    average = copy.deepcopy(model)

    def after_step(step: int) -> None:
        beta = decay(step) if callable(decay) else decay
        with torch.no_grad():
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.mul_(beta).add_(now, alpha=1 - beta)
            for kept, now in zip(average.buffers(), model.buffers(), strict=True):
                kept.copy_(now)

    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    return average, train(model, optimizer, after_step)


def _lightning_parts(optimizer_state: Any) -> dict[str, Any]:
    return {
        "epoch": 1,
        "global_step": STEPS,
        "pytorch-lightning_version": "2.4.0",
        "loops": {},
        "callbacks": {},
        "optimizer_states": [optimizer_state],
        "lr_schedulers": [{"last_epoch": STEPS}],
        "hparams_name": "cfg",
        "hyper_parameters": {"width": 4},
    }


@case("nemo")
def nemo(folder: Path) -> None:
    """A pair: the weights, and beside them a file whose name ends in -EMA."""
    model = tiny(tied=True)
    average, optimizer = _averaged(model)
    inner = optimizer.state_dict()
    torch.save({**_lightning_parts(inner), "state_dict": model.state_dict()}, folder / "tiny--loss=1.5-epoch=1.ckpt")
    wrapped = {
        "opt": inner,
        "ema": list(average.parameters()),
        "current_step": STEPS,
        "decay": 0.9,
        "every_n_steps": 1,
    }
    name = "tiny--loss=1.5-epoch=1-EMA.ckpt"
    torch.save({**_lightning_parts(wrapped), "state_dict": average.state_dict()}, folder / name)
    write(
        folder,
        path=name,
        format="nemo",
        libraries=[],
        averages={"average": average.state_dict()},
        raw=model.state_dict(),
        counters={"current_step": STEPS, "epoch": 1, "global_step": STEPS},
        decay=0.9,
        documented=True,
        raw_path="tiny--loss=1.5-epoch=1.ckpt",
    )


class EasyDict(dict):
    """A dictionary whose items are attributes, too."""

    __getattr__ = dict.__getitem__


@case("edm2-training")
def edm2_training(folder: Path) -> None:
    """Power-function averages in time of images, and a counter in a dictionary of the authors' own class."""
    from polyak import Power

    EasyDict.__module__ = "dnnlib.util"
    sys.modules["dnnlib"] = types.ModuleType("dnnlib")
    sys.modules["dnnlib.util"] = types.ModuleType("dnnlib.util")
    sys.modules["dnnlib.util"].EasyDict = EasyDict
    batch, stds = 8, (0.05, 0.1)
    averages = []
    for std in stds:
        exponent = Power(relative_std=std).exponent
        model = tiny()
        average, optimizer = _averaged(model, lambda step, power=exponent + 1: (1 - 1 / step) ** power)
        averages.append(average)
    content = {
        "state": EasyDict(cur_nimg=STEPS * batch, total_elapsed_time=1.25),
        "net": model.state_dict(),
        "loss_fn": {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5},
        "optimizer": optimizer.state_dict(),
        "ema": {"stds": list(stds), "emas": [average.state_dict() for average in averages]},
    }
    torch.save(content, folder / "training-state-0000000.pt")
    write(
        folder,
        path="training-state-0000000.pt",
        format="edm2-training",
        libraries=[],
        averages={f"{std:.3f}": average.state_dict() for std, average in zip(stds, averages, strict=True)},
        raw=model.state_dict(),
        counters={"cur_nimg": STEPS * batch},
        documented=True,
        stds=list(stds),
    )


@case("d2go")
def d2go(folder: Path) -> None:
    """detectron2's dictionary, and the file beside it that names the last one."""
    model = tiny()
    average, optimizer = _averaged(model)
    name = f"model_{STEPS - 1:07d}.pth"
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": STEPS, "base_lrs": [0.01]},
        "ema_state": dict(average.state_dict()),
        "iteration": STEPS - 1,
    }
    torch.save(content, folder / name)
    (folder / "last_checkpoint").write_text(name)
    write(
        folder,
        path=name,
        format="d2go",
        libraries=[],
        averages={"average": average.state_dict()},
        raw=model.state_dict(),
        counters={"iteration": STEPS - 1},
        documented=True,
    )


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


@case("litema")
def litema(folder: Path) -> None:
    """Latent diffusion: the averages are buffers, named as the parameters without their dots."""
    model = tiny()
    model.head.bias.requires_grad_(False)
    average, optimizer = _averaged(model, lambda step: min(0.9, (1 + step) / (10 + step)))
    trained = {key: each for key, each in average.named_parameters() if each.requires_grad}
    state = {
        "betas": torch.linspace(0.1, 0.2, 4),
        **_prefixed("model.diffusion_model.", model.state_dict()),
        "model_ema.decay": torch.tensor(0.9, dtype=torch.float32),
        "model_ema.num_updates": torch.tensor(STEPS, dtype=torch.int32),
        **{"model_ema.diffusion_model" + key.replace(".", ""): each.detach() for key, each in trained.items()},
        "first_stage_model.encoder.conv_in.weight": torch.ones(2, 2),
    }
    torch.save({**_lightning_parts(optimizer.state_dict()), "state_dict": state}, folder / "last.ckpt")
    write(
        folder,
        path="last.ckpt",
        format="litema",
        libraries=[],
        averages={"average": _prefixed("model.diffusion_model.", trained)},
        raw={key: each for key, each in state.items() if not key.startswith("model_ema.")},
        counters={"num_updates": STEPS, "epoch": 1, "global_step": STEPS},
        decay=float(torch.tensor(0.9)),
        documented=True,
        prefix="model.diffusion_model.",
        frozen=["head.bias"],
    )


@case("cosmos")
def cosmos(folder: Path) -> None:
    """A tracker beside the network in one module: buffers, named as the parameters with dashes for dots."""
    model = tiny(tied=True)
    average, optimizer = _averaged(model)
    tracked = {key.replace(".", "-"): each.detach() for key, each in average.named_parameters()}
    content = {
        "model": {**_prefixed("net.", model.state_dict()), **_prefixed("ema.", tracked)},
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": STEPS},
        "grad_scaler": {},
        "iteration": STEPS,
    }
    torch.save(content, folder / f"iter_{STEPS:09}.pt")
    write(
        folder,
        path=f"iter_{STEPS:09}.pt",
        format="cosmos",
        libraries=[],
        averages={"average": _prefixed("net.", dict(average.named_parameters(remove_duplicate=False)))},
        raw=_prefixed("net.", model.state_dict()),
        counters={"iteration": STEPS},
        documented=True,
        prefix="net.",
    )


@case("dit")
def dit(folder: Path) -> None:
    model = tiny()
    average, optimizer = _averaged(model)
    content = {
        "model": model.state_dict(),
        "ema": average.state_dict(),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256, global_seed=0, epochs=1),
    }
    torch.save(content, folder / f"{STEPS:07d}.pt")
    write(
        folder,
        path=f"{STEPS:07d}.pt",
        format="dit",
        libraries=[],
        averages={"average": average.state_dict()},
        raw=model.state_dict(),
        documented=True,
    )


@case("guided-diffusion")
def guided_diffusion(folder: Path) -> None:
    """Three files with the step in their names; that of the averages has the decay in its own."""
    model = tiny()
    average, optimizer = _averaged(model, 0.9999)
    torch.save(average.state_dict(), folder / f"ema_0.9999_{STEPS:06d}.pt")
    torch.save(model.state_dict(), folder / f"model{STEPS:06d}.pt")
    torch.save(optimizer.state_dict(), folder / f"opt{STEPS:06d}.pt")
    write(
        folder,
        path=f"ema_0.9999_{STEPS:06d}.pt",
        format="guided-diffusion",
        libraries=[],
        averages={"average": average.state_dict()},
        raw=model.state_dict(),
        counters={"step": STEPS},
        decay=0.9999,
        documented=True,
        raw_path=f"model{STEPS:06d}.pt",
    )


@case("simpletuner")
def simpletuner(folder: Path) -> None:
    """The averages one by one beside the settings, in one flat dictionary."""
    model = tiny()
    average, _ = _averaged(model)
    names = [name for name, _ in model.named_parameters()]
    settings = {
        "decay": 0.9,
        "min_decay": 0.0,
        "optimization_step": STEPS,
        "update_after_step": 0,
        "use_ema_warmup": False,
        "inv_gamma": 1.0,
        "power": 2 / 3,
    }
    shadow = {f"shadow_params.{index}": each.detach() for index, each in enumerate(average.parameters())}
    torch.save({**settings, **shadow}, folder / "ema_model.pt")
    write(
        folder,
        path="ema_model.pt",
        format="simpletuner",
        libraries=[],
        averages={"average": copied(dict(average.named_parameters()))},
        names=names,
        counters={"optimization_step": STEPS},
        decay=0.9,
        documented=True,
    )
