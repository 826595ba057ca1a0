"""Folders of torch.distributed.checkpoint, and what polyak itself writes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from makers.common import STEPS, case, copied, tiny, train, write

RANKS = 2


class Wide(nn.Module):
    """Its first dimensions, 5 and 1, do not divide by the number of ranks; batch norm has buffers, not sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5, affine=False)
        self.head = nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(inputs))) * torch.ones(2)


def _whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """On every rank, the whole of each tensor."""
    return copied({key: each.full_tensor() if hasattr(each, "full_tensor") else each for key, each in tensors.items()})


def _rank(rank: int, folder: Path, layout: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, average = Wide(), Wide()
    average.load_state_dict(model.state_dict())
    mesh = init_device_mesh("cpu", (RANKS,))
    for each in (model, average):
        fully_shard(each, mesh=mesh)

    def after_step(step: int) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.1)
            for kept, now in zip(average.buffers(), model.buffers(), strict=True):
                kept.copy_(now)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, after_step)
    if layout == "torchtitan":
        averages = {key: each.detach() for key, each in average.named_parameters()}
        content = _torchtitan(model, optimizer, averages)
        raw = _whole(model.state_dict())
    elif layout == "nested":
        averages = average.state_dict()
        content = {"model": model.state_dict(), "model_ema": averages, "epoch": 3, "args": {"lr": 0.01}}
        raw = _whole(model.state_dict())
    else:
        averages = content = average.state_dict()
        raw = {}
    dcp.save(content, checkpoint_id=folder / "checkpoint")
    expected = {f"average/{key}": each for key, each in _whole(averages).items()}
    expected |= {f"raw/{key}": each for key, each in raw.items()}
    if rank == 0:
        save_file(expected, folder / "memory.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def _torchtitan(model: nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, Any]) -> dict[str, Any]:
    """What torchtitan's checkpointer saves: the model at the top, the rest under its names.

    The averages are the state of a second optimizer, which has no released version yet.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    averaging: dict[str, Any] = {f"state.{key}.ema_params": each for key, each in averages.items()}
    averaging |= {f"param_groups.{key}.half_life_fraction": 0.05 for key in averages}
    return {
        **model.state_dict(),
        # Of the many settings of each parameter, one, as each is a file of a kilobyte within the file.
        "optimizer": {key: each for key, each in state.items() if key.startswith("state.") or key.endswith(".lr")},
        "ema_optimizer": averaging,
        "lr_scheduler": {"last_epoch": STEPS},
        "train_state": {"step": torch.tensor(STEPS)},
    }


def _sharded(folder: Path, layout: str, format: str, **more: Any) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        torch.multiprocessing.spawn(_rank, (Path(temporary), layout), nprocs=RANKS)
        memory = load_file(Path(temporary) / "memory.safetensors")
        (Path(temporary) / "checkpoint").rename(folder / "checkpoint")
    average = {key.removeprefix("average/"): each for key, each in memory.items() if key.startswith("average/")}
    raw = {key.removeprefix("raw/"): each for key, each in memory.items() if key.startswith("raw/")}
    write(
        folder,
        path="checkpoint",
        format=format,
        libraries=[],
        averages={"average": average},
        raw=raw or None,
        ranks=RANKS,
        **more,
    )


@case("dcp")
def dcp_folder(folder: Path) -> None:
    """The averaged model alone."""
    _sharded(folder, "flat", "dcp")


@case("dcp-nested")
def dcp_nested(folder: Path) -> None:
    """The layout of `model-ema` in a folder."""
    _sharded(folder, "nested", "model-ema", counters={"epoch": 3})


@case("torchtitan")
def torchtitan(folder: Path) -> None:
    _sharded(folder, "torchtitan", "torchtitan", documented=True, counters={"step": STEPS})


@case("polyak-state")
def polyak_state(folder: Path) -> None:
    import polyak

    model = tiny(tied=True)
    profiles = {"power": polyak.Power(relative_std=0.1), "ema": polyak.Exponential(half_life=3, debias=True)}
    average = polyak.WeightAverage(model, profiles)
    train(model, after_step=lambda step: average.update())
    torch.save(average.state_dict(), folder / "average.pt")
    _write_polyak(folder, "average.pt", "polyak-state", average)


@case("polyak")
def polyak_export(folder: Path) -> None:
    import polyak

    model = tiny()
    average = polyak.WeightAverage(model, polyak.Exponential(half_life=3))
    train(model, after_step=lambda step: average.update())
    average.export(folder / "average.safetensors")
    _write_polyak(folder, "average.safetensors", "polyak", average)


def _write_polyak(folder: Path, path: str, format: str, average: Any) -> None:
    write(
        folder,
        path=path,
        format=format,
        libraries=["polyak"],
        averages={name: average[name].weights() for name in average.profiles},
        counters={"num_updates": average.num_updates},
    )
