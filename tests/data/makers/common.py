"""The model, the training, and what is written beside each file."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILES = Path(__file__).resolve().parents[1] / "files"
STEPS = 6

CASES: dict[str, Callable[[Path], None]] = {}


def case(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Registers a function that writes a folder."""

    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES[name] = function
        return function

    return register


class Tiny(nn.Module):
    """Linear and batch norm layers, one with buffers; `tied` adds two layers with one weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.middle = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)] if tied else [])
        if tied:
            self.middle[1].weight = self.middle[0].weight
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.stem(inputs))
        for layer in self.middle:
            hidden = layer(hidden)
        return self.head(hidden)


def tiny(tied: bool = False) -> Tiny:
    torch.manual_seed(0)
    return Tiny(tied)


def batches(count: int = STEPS, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    after_step: Callable[[int], object] = lambda step: None,
    steps: int = STEPS,
) -> torch.optim.Optimizer:
    """Takes real optimizer steps, and calls `after_step` with the number of each, from 1."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, (inputs, targets) in enumerate(batches(steps), start=1):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        after_step(step)
    return optimizer


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies that share no memory, as they are now."""
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def write(
    folder: Path,
    *,
    path: str,
    format: str,
    libraries: list[str],
    averages: Mapping[str, Mapping[str, Tensor]],
    raw: Mapping[str, Tensor] | None = None,
    names: list[str] | None = None,
    counters: Mapping[str, float] | None = None,
    decay: float | None = None,
    **more: Any,
) -> None:
    """Writes `expected.safetensors` and `about.json`.

    Args:
        folder: the folder of the case.
        path: what a user would open, relative to the folder.
        format: the name of the layout.
        libraries: the distributions whose versions are noted.
        averages: each average in the library's memory, by the model's own keys.
        raw: the training weights where the file has them.
        names: the parameters in order, for a file that has no names.
        counters: what the library counts.
        decay: the decay if the file has it.
        more: anything else worth noting.
    """
    expected = {
        f"average/{name}/{key}": tensor for name, tensors in averages.items() for key, tensor in tensors.items()
    }
    expected |= {f"raw/{key}": tensor for key, tensor in (raw or {}).items()}
    save_file(copied(expected), folder / "expected.safetensors")
    assert (folder / path).exists(), path
    about: dict[str, Any] = {
        "path": path,
        "format": format,
        "versions": {name: version(name).split("+")[0] for name in ["torch", *libraries]},
        "counters": dict(counters or {}),
        "decay": decay,
        **({"positional": True, "names": names} if names is not None else {}),
        **more,
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")


class _Anything(type):
    """A class whose every other name is that name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Pretended(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (nn.Module,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != self.package:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Pretended(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def pretend(*packages: str) -> None:
    """Makes packages importable that a library imports at its top and that no case uses.

    torchvision, for one, has no build for the CPU alone among those of torch that are used here.
    """
    sys.meta_path[:0] = [_Finder(package) for package in packages]
