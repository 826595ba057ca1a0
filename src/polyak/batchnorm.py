"""The running statistics of BatchNorm layers, computed anew for the weights that a model has now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from polyak.errors import StateError
from polyak.ranks import is_initialized

Forward = Callable[[nn.Module, Any], object]


@torch.no_grad()
def recalibrate_batchnorm(
    module: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None, progress: bool = False
) -> None:
    """Computes the running statistics of every BatchNorm layer anew, over the given batches.

        running_mean = sum(size * mean) / sum(size),    running_var = sum(size * variance) / sum(size)

    A batch has a mean, an unbiased variance and a size for each layer: how many values the layer takes a channel's
    mean over. Where all samples have one shape, the size is proportional to the number of samples, and a small last
    batch counts for what it is. Batches of one size give what `torch.optim.swa_utils.update_bn` does; the sums are
    taken in float64.

    Averaged weights need this where their own statistics are not averaged with them: after a uniform average or a
    merge, say. Inside of `with average.swapped():` what it computes stays with the average until the next update.

    The module runs in training mode, as `module.train()` sets it, without gradients. Layers that are not in training
    mode then, or that no batch reaches, keep their statistics. Modes and momenta are as before afterwards, and so are
    the statistics, too, if anything is raised. Where `torch.distributed` is initialised, the sums are taken over all
    ranks: every rank must make the call, each with its own batches.

    Args:
        module: bare or wrapped. Layers are those that have `running_mean`, `running_var` and `momentum`, as all of
            torch's do. Without any, nothing is run.
        batches: a data loader or any iterable. Of a tuple or list, the module gets the first element; of a mapping,
            the items as keywords; anything else as it is. Tensors are moved to the module's device.
        forward: calls the module with a batch in another way: `forward(module, batch)`. DataParallel, DDP and
            torch.compile are taken off the module, and nothing is moved.
        progress: show a progress bar.

    Raises:
        ValueError: there are no batches, or one is empty, or none reaches a layer; or, from torch, a batch has a single
            value a channel, which has no variance: leave it out, as `drop_last=True` does.
        StateError: a layer is not initialised yet.
        TypeError: it is no module.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
        >>> recalibrate_batchnorm(model, [torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([[7.0], [9.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([5.]), tensor([3.2000]))

    Source: Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018, section 3.2.
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise TypeError(f"module: a torch.nn.Module is needed, not {type(module).__name__}")
    module = _unwrapped(module)
    layers = [_Layer(part) for part in module.modules() if _keeps_statistics(part)]
    modes = [(part, part.training) for part in module.modules()]
    if not layers:
        return
    try:
        module.train()
        layers = [layer for layer in layers if layer.module.training]
        for layer in layers:
            layer.start()
        num_batches = 0
        with _without_compiled_code(), _with_progress(batches, progress) as shown:
            for batch in shown:
                (forward or _forward)(module, batch)
                num_batches += 1
        num_batches = _sum_over_ranks(layers, num_batches)
        if layers and num_batches == 0:
            raise ValueError("batches: there are none, and statistics need at least one; was the iterator used before?")
        if layers and not any(layer.was_reached() for layer in layers):
            raise ValueError(
                f"no batch reached any of the {len(layers)} BatchNorm layers in training mode: does forward= call the "
                "module that it is given, and leave its mode alone?"
            )
        for layer in layers:
            layer.write(num_batches)
    except BaseException:
        for layer in layers:
            layer.restore()
        raise
    finally:
        for layer in layers:
            layer.stop()
        for part, mode in modes:
            part.training = mode


class _Layer:
    """One layer, with the sums over its batches.

    While it is started its momentum is 1, so after each call its buffers hold the statistics of that batch alone, as
    the layer itself computes them.
    """

    def __init__(self, module: Any) -> None:
        if nn.parameter.is_lazy(module.running_mean):
            raise StateError(f"a {type(module).__name__} is not initialised yet; run a forward pass first")
        self.module = module
        self._momentum: float | None = module.momentum
        self._saved = {name: tensor.clone() for name, tensor in self._buffers().items()}
        # The sums of size * mean, size * variance and size. Not all devices have float64, as Apple's has not.
        device = "cpu" if module.running_mean.device.type == "mps" else module.running_mean.device
        self.sums = torch.zeros((3, module.running_mean.numel()), dtype=torch.float64, device=device)
        self._handle: RemovableHandle | None = None

    def _buffers(self) -> dict[str, Tensor]:
        names = ("running_mean", "running_var", "num_batches_tracked")
        return {name: getattr(self.module, name) for name in names if getattr(self.module, name, None) is not None}

    def start(self) -> None:
        """Lets the layer add up what it sees."""
        # A momentum of 1 takes 0 times what was there, which must not be infinite or NaN.
        self.module.running_mean.zero_()
        self.module.running_var.fill_(1.0)
        self.module.momentum = 1.0
        self._handle = self.module.register_forward_hook(self._add, with_kwargs=True)

    def stop(self) -> None:
        """Leaves the layer to itself."""
        self.module.momentum = self._momentum
        if self._handle is not None:
            self._handle.remove()

    def was_reached(self) -> bool:
        """Whether any batch came to this layer."""
        return bool(self.sums[2].any())

    def write(self, num_batches: int) -> None:
        """Puts the statistics over all batches into the layer, or the old ones where it had none."""
        if not self.was_reached():
            self.restore()
            return
        self.module.running_mean.copy_(self.sums[0] / self.sums[2])
        self.module.running_var.copy_(self.sums[1] / self.sums[2])
        if "num_batches_tracked" in self._saved:
            self.module.num_batches_tracked.fill_(num_batches)

    def restore(self) -> None:
        """Puts the statistics back that the layer had at first."""
        for name, tensor in self._saved.items():
            getattr(self.module, name).copy_(tensor)

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if not module.training:
            return
        size = next(iter((*args, *kwargs.values()))).numel() // self.sums.shape[1]
        if size == 0:
            raise ValueError("batches: a batch without samples came to a BatchNorm layer; leave it out")
        mean, variance = self.module.running_mean, self.module.running_var
        statistics = torch.stack([mean, variance, torch.ones_like(mean)])
        self.sums.add_(statistics.to(self.sums), alpha=size)


def _keeps_statistics(module: nn.Module) -> bool:
    tensors = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    # Layers that are frozen for good have no momentum.
    return all(isinstance(tensor, Tensor) for tensor in tensors) and hasattr(module, "momentum")


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that call it with what they are given, and would only get in the way."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = cast("nn.Module", module.module)
        elif "_orig_mod" in module._modules:
            module = cast("nn.Module", module._modules["_orig_mod"])
        else:
            return module


def _forward(module: nn.Module, batch: object) -> None:
    device = next(chain(module.parameters(), module.buffers())).device
    if isinstance(batch, Mapping):
        module(**{key: _moved(value, device) for key, value in cast("Mapping[str, object]", batch).items()})
    elif isinstance(batch, (list, tuple)):
        if not batch:
            raise ValueError(f"batches: {batch!r} is an empty batch; leave it out")
        module(_moved(cast("list[object] | tuple[object, ...]", batch)[0], device))
    else:
        module(_moved(batch, device))


def _moved(value: Any, device: torch.device) -> Any:
    """A value with the tensors that it holds on the device; whatever else can be moved there as they can, too."""
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in cast("dict[object, object]", value).items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if hasattr(value, "to") else value


def _without_compiled_code() -> AbstractContextManager[object]:
    """Parts that were compiled run as they are written: compiled code may have been made without our hooks."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    if set_stance is None or "torch._dynamo" not in sys.modules:
        return nullcontext()
    return set_stance("force_eager")


@contextmanager
def _with_progress(batches: Iterable[Any], progress: bool) -> Generator[Iterable[Any], None, None]:
    if not progress or (is_initialized() and distributed.get_rank() > 0):
        yield batches
        return
    from rich.progress import Progress

    with Progress() as bar:
        yield bar.track(batches, description="BatchNorm statistics")


def _sum_over_ranks(layers: list[_Layer], num_batches: int) -> int:
    """Makes each layer's sums those of all ranks; returns the number of all batches."""
    if not layers or not is_initialized():
        return num_batches
    device = layers[0].sums.device
    count = torch.tensor([num_batches], dtype=torch.float64, device=device)
    flat = torch.cat([count, *[layer.sums.flatten().to(device) for layer in layers]])
    distributed.all_reduce(flat)  # pyright: ignore[reportUnknownMemberType]  # torch leaves it half untyped
    count, *parts = torch.split(flat, [1, *[layer.sums.numel() for layer in layers]])
    for layer, part in zip(layers, parts, strict=True):
        layer.sums.copy_(part.view_as(layer.sums))
    return int(count)
