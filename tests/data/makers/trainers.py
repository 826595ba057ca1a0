"""Averages kept by libraries that run the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from makers.common import STEPS, Tiny, batches, case, copied, pretend, tiny, train, write


def _loader() -> DataLoader:
    """Two batches."""
    inputs, targets = (torch.cat(each) for each in zip(*batches(2), strict=True))
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


def _lightning(folder: Path, callback: Any, held: bool, epochs: int = 4) -> dict[str, Any]:
    """Trains for epochs of two steps with a checkpoint after each, and keeps the last but one.

    What it gives is what was in memory when that was saved, as arguments of `write`.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    class Layers(pl.LightningModule):
        """With layers of its own, or with a model as an attribute."""

        def __init__(self, width: int = 4, rate: float = 0.05) -> None:
            super().__init__()
            self.save_hyperparameters()
            if held:
                self.model = tiny(tied=True)
            else:
                self.stem, self.norm, self.head = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs) if held else self.head(self.norm(self.stem(inputs)))

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
            self.log("loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.rate)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    memory: dict[int, dict[str, Any]] = {}

    class Watch(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            average = callback._average_model
            memory[trainer.current_epoch] = {
                "averages": {"average": copied(getattr(average, "module", average).state_dict())},
                "raw": copied(pl_module.state_dict()),
                "counters": {
                    "n_averaged": int((average if hasattr(average, "n_averaged") else callback).n_averaged or 0),
                    "epoch": trainer.current_epoch,
                    "global_step": trainer.global_step,
                },
            }

    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, Watch(), ModelCheckpoint(dirpath="checkpoints", monitor="loss", save_top_k=-1)],
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(Layers(), _loader(), _loader())
    kept = epochs - 2
    (path,) = Path("checkpoints").glob(f"epoch={kept}-*.ckpt")
    path.rename(folder / path.name)
    return {"path": path.name, "libraries": ["lightning"], **memory[kept]}


@case("lightning")
def lightning(folder: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    seen = _lightning(folder, EMAWeightAveraging(decay=0.9), held=False)
    write(folder, format="lightning", **seen)


@case("lightning-weight-averaging")
def lightning_weight_averaging(folder: Path) -> None:
    from lightning.pytorch.callbacks import WeightAveraging

    seen = _lightning(folder, WeightAveraging(use_buffers=False), held=True)
    write(folder, format="lightning", **seen)


@case("lightning-swa")
def lightning_swa(folder: Path) -> None:
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    seen = _lightning(
        folder, StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=2), held=False
    )
    write(folder, format="lightning-swa", **seen)


@case("lightning-swa-early")
def lightning_swa_early(folder: Path) -> None:
    """Saved before averaging starts: the file has the initial weights in the place of an average."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    seen = _lightning(folder, StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=4), held=False)
    write(folder, format="lightning-swa", not_started=True, **seen)


@case("mmengine")
def mmengine_runner(folder: Path) -> None:
    _mmengine(folder, tied=False)


@case("mmengine-annealing")
def mmengine_annealing(folder: Path) -> None:
    _mmengine(folder, tied=True, ema_type="MomentumAnnealingEMA", gamma=3, update_buffers=True)


def _mmengine(folder: Path, tied: bool, **options: Any) -> None:
    from mmengine.hooks import EMAHook, Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny(tied)

        def forward(self, inputs: Tensor, targets: Tensor, mode: str = "tensor") -> Any:
            outputs = self.net(inputs)
            return {"loss": nn.functional.mse_loss(outputs, targets)} if mode == "loss" else outputs

    class Pairs(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.inputs, self.targets = (torch.cat(each) for each in zip(*batches(2), strict=True))

        def __len__(self) -> int:
            return len(self.inputs)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"inputs": self.inputs[index], "targets": self.targets[index]}

    model = Model()
    memory: dict[str, Any] = {}

    class Watch(Hook):
        priority = "VERY_LOW"

        def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
            (ema,) = (hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))
            memory.update(
                averages={"average": copied(ema.module.state_dict())},
                raw=copied(runner.model.state_dict()),
                counters={"steps": int(ema.steps), "iter": runner.iter, "epoch": runner.epoch + 1},
            )

    runner = Runner(
        model=model,
        work_dir="work",
        train_dataloader={
            "dataset": Pairs(),
            "batch_size": 8,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 3},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}, "logger": {"type": "LoggerHook"}},
        custom_hooks=[{"type": "EMAHook", "momentum": 0.1, **options}, Watch()],
        randomness={"seed": 0},
        log_level="ERROR",
        experiment_name="tiny",
        default_scope="mmengine",
    )
    runner.train()
    Path("work/epoch_3.pth").rename(folder / "epoch_3.pth")
    write(folder, path="epoch_3.pth", format="mmengine", libraries=["mmengine"], **memory)


@case("mmengine-module")
def mmengine_module(folder: Path) -> None:
    from mmengine.model import ExponentialMovingAverage

    model = tiny()
    ema = ExponentialMovingAverage(model, momentum=0.1)
    train(model, after_step=lambda step: ema.update_parameters(model))
    torch.save(ema.state_dict(), folder / "ema.pth")
    write(
        folder,
        path="ema.pth",
        format="mmengine-module",
        libraries=["mmengine"],
        averages={"average": ema.module.state_dict()},
        counters={"steps": int(ema.steps)},
    )


@case("composer")
def composer_ema(folder: Path) -> None:
    """As its Trainer saves: with the averages in the model, and the weights in the algorithm."""
    _composer(folder, "composer", active=True)


@case("composer-inactive")
def composer_inactive(folder: Path) -> None:
    """Saved by hand within training, where the weights are in the model."""
    _composer(folder, "composer", active=False)


@case("composer-swa")
def composer_swa(folder: Path) -> None:
    _composer(folder, "composer-swa", active=True)


def _composer(folder: Path, format: str, active: bool) -> None:
    pretend("torchvision", "mcli")
    from composer import Algorithm, Callback, Trainer
    from composer.algorithms import EMA, SWA
    from composer.models import ComposerModel

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny(tied=True)
            self.net.stem.bias.requires_grad_(False)

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return self.net(batch[0])

        def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.mse_loss(outputs, batch[1])

    model = Model()
    algorithm: Algorithm = (
        EMA(half_life="3ba", update_interval="1ba")
        if format == "composer"
        else SWA(swa_start="0.3dur", swa_end="0.99dur", update_interval="1ep", schedule_swa_lr=False)
    )
    memory: dict[int, dict[str, Any]] = {}

    def remember() -> dict[str, Any]:
        here = copied(model.state_dict())
        if isinstance(algorithm, SWA):
            counters = {"n_averaged": int(algorithm.swa_model.n_averaged), "step_counter": algorithm.step_counter}
            average = copied(algorithm.swa_model.module.state_dict())
            return {"averages": {"average": average}, "raw": here, "counters": counters}
        # A frozen parameter is only in the model, and the same in both.
        other = {**here, **copied(algorithm.ema_model.named_parameters_dict)}
        other |= copied(algorithm.ema_model.named_buffers_dict)
        # What is tied has one name in the algorithm.
        other["net.middle.1.weight"] = other["net.middle.0.weight"]
        average, raw = (here, other) if algorithm.ema_weights_active else (other, here)
        return {
            "averages": {"average": average},
            "raw": raw,
            "ema_weights_active": algorithm.ema_weights_active,
            "tied": {"net.middle.1.weight": "net.middle.0.weight"},
            "frozen": ["net.stem.bias"],
        }

    class Watch(Callback):
        def state_dict(self) -> dict[str, Any]:
            memory[int(trainer.state.timestamp.batch)] = remember()
            return {}

        def batch_end(self, state: Any, logger: Any) -> None:
            if not active and state.timestamp.batch == 5:
                trainer.save_checkpoint("ba5.pt")

    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05),
        train_dataloader=_loader(),
        max_duration="4ep",
        algorithms=[algorithm],
        callbacks=[Watch()],
        save_folder=".",
        save_filename="ba{batch}.pt",
        save_latest_filename=None,
        save_interval="1ep",
        device="cpu",
        progress_bar=False,
        seed=0,
        run_name="tiny",
        loggers=[],
    )
    trainer.fit()
    batch = 6 if active else 5
    Path(f"ba{batch}.pt").rename(folder / f"ba{batch}.pt")
    write(folder, path=f"ba{batch}.pt", format=format, libraries=["mosaicml"], **memory[batch])


@case("ignite")
def ignite_handler(folder: Path) -> None:
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver, EMAHandler

    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer = Engine(step)
    handler = EMAHandler(model, momentum=0.1, handle_buffers="ema_train")
    handler.attach(trainer, name="momentum", event=Events.ITERATION_COMPLETED)
    saved = {"model": model, "ema_model": handler.ema_model, "optimizer": optimizer, "trainer": trainer}
    saver = Checkpoint(saved, DiskSaver(str(folder), create_dir=False, require_empty=False), n_saved=1)
    trainer.add_event_handler(Events.COMPLETED, saver)
    trainer.run(list(batches()), max_epochs=1)
    write(
        folder,
        path=f"checkpoint_{STEPS}.pt",
        format="ignite",
        libraries=["pytorch-ignite"],
        averages={"average": handler.ema_model.state_dict()},
        raw=model.state_dict(),
        counters={"iteration": STEPS},
    )


@case("fairseq")
def fairseq_fp32(folder: Path) -> None:
    _fairseq(folder, tiny().bfloat16(), ema_fp32=True)


@case("fairseq-plain")
def fairseq_plain(folder: Path) -> None:
    _fairseq(folder, tiny(tied=True), ema_fp32=False)


def _fairseq(folder: Path, model: Tiny, ema_fp32: bool) -> None:
    """The library's EMA class and the dictionary that its Trainer makes.

    fairseq 0.12.2 cannot be imported with Python 3.11 or later, but the module of the class can, by itself.
    """
    import importlib.util
    import sys
    import types
    from importlib.metadata import distribution

    package = types.ModuleType("fairseq")
    package.checkpoint_utils = types.ModuleType("fairseq.checkpoint_utils")
    sys.modules["fairseq"] = package
    source = Path(str(distribution("fairseq").locate_file("fairseq/models/ema/ema.py")))
    specification = importlib.util.spec_from_file_location("fairseq_ema", source)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    config = types.SimpleNamespace(
        ema_decay=0.9, ema_seed_model=None, ema_fp32=ema_fp32, ema_update_freq=1, ema_start_update=0
    )
    # It cannot average an integer.
    ema = module.EMA(model, config, skip_keys={"norm.num_batches_tracked"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, (inputs, targets) in enumerate(batches(), start=1):
        optimizer.zero_grad()
        dtype = model.head.weight.dtype
        nn.functional.mse_loss(model(inputs.to(dtype)), targets.to(dtype)).backward()
        optimizer.step()
        ema.step(model, step)
    content = {
        "args": None,
        "cfg": {"_name": None, "common": {"seed": 0, "bf16": ema_fp32}, "ema": vars(config)},
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "MSECriterion",
                "optimizer_name": "FairseqSGD",
                "lr_scheduler_state": {"best": None},
                "num_updates": STEPS,
            }
        ],
        "task_state": {},
        "extra_state": {
            "metrics": {},
            "previous_training_time": 1.5,
            "ema": ema.get_model().state_dict(),
            **({"ema_fp32_params": ema.fp32_params} if ema_fp32 else {}),
            "train_iterator": {"epoch": 1, "iterations_in_epoch": STEPS, "shuffle": True},
            "val_loss": None,
        },
        "last_optimizer_state": optimizer.state_dict(),
    }
    torch.save(content, folder / "checkpoint_last.pt")
    write(
        folder,
        path="checkpoint_last.pt",
        format="fairseq",
        libraries=["fairseq"],
        averages={"average": ema.fp32_params if ema_fp32 else ema.get_model().state_dict()},
        raw=model.state_dict(),
        counters={"num_updates": STEPS},
    )


@case("k-diffusion")
def k_diffusion(folder: Path) -> None:
    """The library's functions, and the dictionary of its train.py."""
    pretend("torchvision", "clip", "cleanfid", "skimage", "torchdiffeq", "torchsde", "kornia", "scipy", "wandb")
    import copy

    from k_diffusion.utils import EMAWarmup, ema_update

    model = tiny()
    average = copy.deepcopy(model)
    schedule = EMAWarmup(power=0.6667, max_value=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    def after_step(step: int) -> None:
        scheduler.step()
        ema_update(model, average, schedule.get_value())
        schedule.step()

    train(model, optimizer, after_step)
    content = {
        "config": {"model": {"type": "tiny"}, "ema_sched": {"type": "inverse", "power": 0.6667, "max_value": 0.9}},
        "model": model.state_dict(),
        "model_ema": average.state_dict(),
        "opt": optimizer.state_dict(),
        "sched": scheduler.state_dict(),
        "ema_sched": schedule.state_dict(),
        "epoch": 0,
        "step": STEPS,
        "gns_stats": None,
        "ema_stats": {},
    }
    torch.save(content, folder / f"tiny_{STEPS:08}.pth")
    write(
        folder,
        path=f"tiny_{STEPS:08}.pth",
        format="k-diffusion",
        libraries=["k-diffusion"],
        averages={"average": average.state_dict()},
        raw=model.state_dict(),
        counters={"step": STEPS, "last_epoch": schedule.last_epoch},
    )
