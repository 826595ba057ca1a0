"""Averages kept by libraries that leave the training loop to their user."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from makers.common import STEPS, case, pretend, tiny, train, write


def _timm_arguments() -> argparse.Namespace:
    return argparse.Namespace(model="tiny", lr=0.1, model_ema=True, model_ema_decay=0.9, mean=None, crop_mode="center")


@case("timm")
def timm_saver(folder: Path) -> None:
    pretend("torchvision")
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = tiny()
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, lambda step: ema.update(model, step=step))
    saver = CheckpointSaver(
        model, optimizer, args=_timm_arguments(), model_ema=ema, checkpoint_dir=str(folder), max_history=1
    )
    saver.save_checkpoint(epoch=3, metric=71.5)
    for name in ("last.pth.tar", "model_best.pth.tar"):
        (folder / name).unlink()
    write(
        folder,
        path="checkpoint-3.pth.tar",
        format="timm",
        libraries=["timm"],
        averages={"average": ema.module.state_dict()},
        raw=model.state_dict(),
        counters={"epoch": 3},
    )


@case("legacy")
def legacy(folder: Path) -> None:
    pretend("torchvision")
    from timm.utils import ModelEmaV2

    model = tiny(tied=True)
    ema = ModelEmaV2(model, decay=0.9)
    optimizer = train(model, after_step=lambda step: ema.update(model))
    content = {
        "epoch": 2,
        "arch": "tiny",
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": _timm_arguments(),
        "state_dict_ema": ema.module.state_dict(),
        "metric": 70.25,
    }
    torch.save(content, folder / "model_best.pth.tar", _use_new_zipfile_serialization=False)
    write(
        folder,
        path="model_best.pth.tar",
        format="timm",
        libraries=["timm"],
        averages={"average": ema.module.state_dict()},
        raw=model.state_dict(),
        counters={"epoch": 2},
    )


@case("timm-module")
def timm_module(folder: Path) -> None:
    pretend("torchvision")
    from timm.utils import ModelEmaV2

    model = tiny()
    ema = ModelEmaV2(model, decay=0.9)
    train(model, after_step=lambda step: ema.update(model))
    torch.save(ema.state_dict(), folder / "ema.pth")
    write(
        folder, path="ema.pth", format="timm-module", libraries=["timm"], averages={"average": ema.module.state_dict()}
    )


@case("timm-module-v3")
def timm_module_v3(folder: Path) -> None:
    pretend("torchvision")
    from timm.utils import ModelEmaV3

    model = tiny(tied=True)
    ema = ModelEmaV3(model, decay=0.9, use_warmup=True)
    train(model, after_step=lambda step: ema.update(model, step=step))
    torch.save(ema.state_dict(), folder / "ema.pth")
    write(
        folder, path="ema.pth", format="timm-module", libraries=["timm"], averages={"average": ema.module.state_dict()}
    )


@case("timm-avg")
def timm_avg(folder: Path) -> None:
    _timm_avg(folder, "averaged.pth", [])


@case("timm-avg-safetensors")
def timm_avg_safetensors(folder: Path) -> None:
    _timm_avg(folder, "averaged.safetensors", ["--safetensors"])


def _timm_avg(folder: Path, name: str, options: list[str]) -> None:
    """Runs avg_checkpoints.py of timm's repository, which is not in its packages, from where the environment says."""
    import os
    import runpy
    import sys
    import tempfile

    pretend("torchvision")
    from timm.utils import CheckpointSaver, ModelEmaV3

    script = os.environ["TIMM_AVG_CHECKPOINTS"]
    model = tiny()
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sums: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as inputs:
        saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=inputs)
        for epoch in range(3):
            train(model, optimizer, lambda step: ema.update(model), steps=2)
            saver.save_checkpoint(epoch=epoch, metric=50.0 + epoch)
            for key, tensor in ema.module.state_dict().items():
                sums[key] = sums.get(key, 0) + tensor.double()
        arguments = sys.argv
        sys.argv = [script, "--input", inputs, "--filter", "checkpoint-*.pth.tar", "--output", str(folder / name)]
        sys.argv += options
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            sys.argv = arguments
    # What the script has in memory: sums in double precision, divided, as float32, also what was an integer.
    average = {key: (total / 3).float() for key, total in sums.items()}
    write(folder, path=name, format="plain", libraries=["timm"], averages={"average": average})


@case("model-ema")
def model_ema(folder: Path) -> None:
    """ConvNeXt's main.py: `ModelEma.ema` of timm beside the model."""
    pretend("torchvision")
    from timm.utils import ModelEma

    model = tiny()
    ema = ModelEma(model, decay=0.9)
    optimizer = train(model, after_step=lambda step: ema.update(model))
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 1,
        "scaler": {},
        "args": _timm_arguments(),
        "model_ema": ema.ema.state_dict(),
    }
    torch.save(content, folder / "checkpoint-1.pth")
    write(
        folder,
        path="checkpoint-1.pth",
        format="model-ema",
        libraries=["timm"],
        averages={"average": ema.ema.state_dict()},
        raw=model.state_dict(),
        counters={"epoch": 1},
    )


@case("torch")
def torch_averaged_model(folder: Path) -> None:
    model = tiny(tied=True)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, after_step=lambda step: averaged.update_parameters(model))
    torch.save(averaged.state_dict(), folder / "ema.pt")
    write(
        folder,
        path="ema.pt",
        format="torch",
        libraries=[],
        averages={"average": averaged.module.state_dict()},
        counters={"n_averaged": int(averaged.n_averaged)},
    )


@case("torchvision")
def torchvision_reference(folder: Path) -> None:
    """The file of torchvision's references/classification/train.py, with its use of AveragedModel."""
    model = tiny()
    averaged = AveragedModel(
        model,
        avg_fn=lambda average, current, count: 0.9 * average + 0.1 * current,
        use_buffers=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=1),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
        ],
        milestones=[1],
    )
    train(model, optimizer, lambda step: averaged.update_parameters(model))
    scheduler.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 0,
        "args": argparse.Namespace(model="tiny", model_ema=True, model_ema_decay=0.99998, device="cpu"),
        "model_ema": averaged.state_dict(),
    }
    torch.save(content, folder / "model_0.pth")
    write(
        folder,
        path="model_0.pth",
        format="torch",
        libraries=[],
        averages={"average": averaged.module.state_dict()},
        raw=model.state_dict(),
        counters={"n_averaged": int(averaged.n_averaged), "epoch": 0},
    )


@case("ema-pytorch")
def ema_pytorch(folder: Path) -> None:
    from ema_pytorch import EMA

    model = tiny()
    ema = EMA(model, beta=0.9, update_after_step=1, update_every=1)
    train(model, after_step=lambda step: ema.update())
    torch.save(ema.state_dict(), folder / "ema.pt")
    write(
        folder,
        path="ema.pt",
        format="ema-pytorch",
        libraries=["ema-pytorch"],
        averages={"average": ema.ema_model.state_dict()},
        raw=model.state_dict(),
        counters={"step": int(ema.step)},
    )


@case("ema-pytorch-karras")
def ema_pytorch_karras(folder: Path) -> None:
    from ema_pytorch import KarrasEMA

    model = tiny(tied=True)
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    train(model, after_step=lambda step: ema.update())
    torch.save(ema.state_dict(), folder / "ema.pt")
    write(
        folder,
        path="ema.pt",
        format="ema-pytorch",
        libraries=["ema-pytorch"],
        averages={"average": ema.ema_model.state_dict()},
        counters={"step": int(ema.step)},
    )


@case("ema-pytorch-posthoc")
def ema_pytorch_posthoc(folder: Path) -> None:
    import tempfile

    from ema_pytorch import PostHocEMA

    model = tiny()
    with tempfile.TemporaryDirectory() as snapshots:
        ema = PostHocEMA(model, sigma_rels=(0.05, 0.28), update_every=1, checkpoint_folder=snapshots)
        train(model, after_step=lambda step: ema.update())
    torch.save(ema.state_dict(), folder / "posthoc.pt")
    write(
        folder,
        path="posthoc.pt",
        format="ema-pytorch-posthoc",
        libraries=["ema-pytorch"],
        averages={str(index): each.ema_model.state_dict() for index, each in enumerate(ema.ema_models)},
        counters={"step": int(ema.step)},
    )


@case("ema-pytorch-posthoc-file")
def ema_pytorch_posthoc_file(folder: Path) -> None:
    from ema_pytorch import PostHocEMA

    model = tiny()
    ema = PostHocEMA(
        model, sigma_rels=(0.05, 0.28), update_every=1, checkpoint_every_num_steps="manual", checkpoint_folder=folder
    )
    train(model, after_step=lambda step: ema.update())
    ema.checkpoint()
    # In the file all is float16, integers too; these are the library's own tensors through that.
    average = {key: tensor.to(torch.float16) for key, tensor in ema.ema_models[1].ema_model.state_dict().items()}
    write(
        folder,
        path=f"1.{STEPS}.pt",
        format="ema-pytorch-posthoc-file",
        libraries=["ema-pytorch"],
        averages={"1": average},
        counters={"step": int(ema.step)},
        siblings=[f"0.{STEPS}.pt"],
    )


@case("torch-ema")
def torch_ema(folder: Path) -> None:
    model = tiny(tied=True)
    state, average, names = _torch_ema(model)
    torch.save(state, folder / "ema.pt")
    write(
        folder,
        path="ema.pt",
        format="torch-ema",
        libraries=["torch-ema"],
        averages={"average": average},
        names=names,
        counters={"num_updates": state["num_updates"]},
        decay=state["decay"],
    )


@case("torch-ema-in-dict")
def torch_ema_in_dict(folder: Path) -> None:
    model = tiny()
    state, average, names = _torch_ema(model)
    torch.save({"model": model.state_dict(), "ema": state}, folder / "checkpoint.pt")
    write(
        folder,
        path="checkpoint.pt",
        format="torch-ema",
        libraries=["torch-ema"],
        averages={"average": average},
        raw=model.state_dict(),
        names=names,
        counters={"num_updates": state["num_updates"]},
        decay=state["decay"],
    )


def _torch_ema(model: nn.Module) -> tuple[dict, dict[str, torch.Tensor], list[str]]:
    from torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay=0.9)
    train(model, after_step=lambda step: ema.update())
    names = [name for name, _ in model.named_parameters()]
    return ema.state_dict(), dict(zip(names, ema.shadow_params, strict=True)), names


@case("schedule-free")
def schedule_free(folder: Path) -> None:
    _schedule_free(folder, train_mode=True)


@case("schedule-free-eval")
def schedule_free_eval(folder: Path) -> None:
    _schedule_free(folder, train_mode=False)


def _schedule_free(folder: Path, train_mode: bool) -> None:
    from schedulefree import AdamWScheduleFree

    model = tiny(tied=True)
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.05, warmup_steps=2)
    optimizer.train()
    train(model, optimizer)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if not train_mode:
        optimizer.eval()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
    optimizer.eval()
    write(
        folder,
        path="checkpoint.pt",
        format="schedule-free",
        libraries=["schedulefree"],
        averages={"average": model.state_dict()},
        raw=weights if train_mode else None,
        counters={"k": optimizer.param_groups[0]["k"]},
        train_mode=train_mode,
    )
