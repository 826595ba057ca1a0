"""The classic class, as training scripts have used it since 2020."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyak.errors import FileFormatError, MismatchError, StateError
from polyak.kernels import check_floating_point, dead_zone
from polyak.model import Source, build_module, check_not_standing, check_same_names, unwrap, walk
from polyak.names import match
from polyak.profiles import Exponential
from polyak.store import Store

_logger = logging.getLogger(__name__)
_PROFILE = "ema"


class ModelEma:
    """An exponential moving average of everything in a model, as a module.

        ema = ema + (1 - decay) * (model - ema)

    `ema` is a whole model of its own in eval mode without gradients: it may be evaluated, moved, loaded and saved. The
    formula is computed without the drift that `ema * decay + (1 - decay) * model` has in float32. And where the class
    that this one replaces worked against its own purpose, this one does what it means:

    - integer and boolean tensors (counters, masks) are copied, for their average is no such thing;
    - tied weights move once an update, not once a name;
    - a model in 16 bits has its average in float32, where it can move at all; give it inputs of float32, or autocast;
    - a model whose tensors do not match by name and shape is an error, and nothing is written;
    - a resume file is read without running what may be pickled in it.

    Args:
        model: the module being trained, bare or wrapped in DataParallel, DDP or torch.compile.
        decay: of the average at each update, from 0 to 1. At 0.9999 its weights are 10,000 updates old on average: in a
            run that is not several times as long, most of it is the weights that the model began with.
        device: where the average is, such as "cpu". Default: where the model is.
        resume: a file that `torch.save` wrote, with the average under "state_dict_ema". Where that key is missing, the
            average starts from the model's own weights, and a warning is logged.

    Attributes:
        ema: the average, a module. Wrapped in what has a `.module`, where the model was.
        module: the same object as `ema`.
        decay: as given; may be changed at any time.
        device: as given.
        ema_has_module: whether `ema` is wrapped.

    Raises:
        FileFormatError: the resume file is damaged, is no dictionary, or holds objects whose loading could run code.
        FileNotFoundError: there is no such file.
        MismatchError: the resume file is of another model.
        StateError: another average stands in the model.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> ema = ModelEma(model, decay=0.9)
        >>> ema.update(model)
        >>> ema.ema(torch.zeros(1, 2)).requires_grad
        False

    Source: Ross Wightman, timm, `ModelEma`, 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        device: torch.device | str | int | None = "",
        resume: str | os.PathLike[str] = "",
    ) -> None:
        self.decay = decay
        self._growth: tuple[float, float] = decay, Exponential(decay).growth(0.0, 1.0)
        self.device = device
        self.ema_has_module = hasattr(model, "module")
        chosen = None if device is None or device == "" else torch.device(device)
        self._source = Source(model, {}, include_frozen=True, any_device=chosen is not None)
        check_not_standing(self._source.bare, "ModelEma()")
        if self._source.shardings or self._source.flat_rank is not None:
            raise StateError(
                f"ModelEma keeps a whole module, and this {type(unwrap(model)).__name__} is sharded over ranks; "
                "polyak.WeightAverage averages shards where they are"
            )
        self._store = Store(self._source.entries, [_PROFILE], device=chosen, may_use_worker=False)
        bare = unwrap(model)
        average = build_module(bare, self._source.entries, self._store.tensors(_PROFILE), owners=[self])
        self._average = Source(average, {}, include_frozen=True, any_device=True, any_dtype=True)
        self.ema = average if bare is model else _wrap_like(model, average)
        if resume:
            self._load_checkpoint(resume)

    @property
    def module(self) -> nn.Module:
        """The same object as `ema`; timm's CheckpointSaver looks for it here."""
        return self.ema

    def __repr__(self) -> str:
        return f"<ModelEma of decay {self.decay} after {self._store.updates.num_made()} updates>"

    def update(self, model: nn.Module) -> None:
        """Takes the model's weights into the average. Call it after `optimizer.step()`.

        Args:
            model: the module being trained, wrapped or bare, however the average is.

        Raises:
            MismatchError: the model or the average has other tensors than at first. Nothing was written.
        """
        if self.decay is not self._growth[0]:
            self._growth = self.decay, Exponential(self.decay).growth(0.0, 1.0)
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
            raise TypeError(f"model: a torch.nn.Module is needed, not {type(model).__name__}")
        check_not_standing(unwrap(model), "update()")
        if model is not self._source.model or not self._source.is_current():
            self._source.refresh(model)
        if not self._average.is_current():
            self._follow_average()
        self._store.bind(self._source.entries)
        self._store.updates.submit([self._growth[1]], at=0.0, look=False)
        self._store.show_changes()

    def _follow_average(self) -> None:
        """Takes the tensors that `ema` has now for the store's, after somebody moved or replaced them."""
        averaged = {entry.name for entry in self._average.entries if entry.action == "average"}
        for site in walk(self._average.model):
            if site.name in averaged and not site.tensor.is_complex():
                _check_dtype(site.tensor.dtype)
        self._average.refresh()
        self._store.replace({entry.name: entry.tensor.detach() for entry in self._average.entries})

    def _load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        # Imported here, because the file formats take as long to import as everything that training needs.
        from polyak.files.checkpoints import read_dictionary

        checkpoint = read_dictionary(path)
        if "state_dict_ema" not in checkpoint:
            _logger.warning("Failed to find state_dict_ema, starting from loaded model weights")
            return
        saved = checkpoint["state_dict_ema"]
        if not isinstance(saved, Mapping) or not all(
            isinstance(name, str) for name in cast("Mapping[object, Any]", saved)
        ):
            raise FileFormatError(f"state_dict_ema in {os.fspath(path)!r} is no dictionary of tensors by name")
        average = self._average.model
        expected = average.state_dict()
        state = match(cast("Mapping[str, Any]", saved), expected)
        check_same_names(
            {name: [name] for name in state},
            {name: [name] for name in expected},
            given_by=f"state_dict_ema in {os.fspath(path)!r}",
            wanted_by="the model",
        )
        for name, tensor in expected.items():
            given = state[name]
            if isinstance(tensor, Tensor) and not (isinstance(given, Tensor) and given.shape == tensor.shape):
                shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise MismatchError(
                    f"{name!r} in {os.fspath(path)!r} is {shape}, and {tuple(tensor.shape)} in the model. Nothing was "
                    "written"
                )
        average.load_state_dict(state)
        _logger.info("Loaded state_dict_ema")


def _check_dtype(dtype: torch.dtype) -> None:
    check_floating_point(dtype)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"ema was cast to {dtype}, in which an average does not move: with nearest rounding and decay 0.9999 it "
            f"ignores every change below {dead_zone(dtype, 0.9999):.3g} times its value. Go back by ema.float(), and "
            "cast a copy of it for a small file"
        )


class _Wrapped(nn.Module):
    """Holds a module under the name `module`, as distributed wrappers do, and calls it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _wrap_like(model: nn.Module, average: nn.Module) -> nn.Module:
    if not hasattr(model, "module"):
        return average
    wrapped: nn.Module
    if isinstance(model, nn.DataParallel):
        wrapped = copy.copy(cast("nn.Module", model))
        wrapped._modules = {**model._modules, "module": average}  # a copy of a module shares this dictionary with it
    else:
        # DDP's reducer and process group serve training, and have nothing to do for an average.
        wrapped = _Wrapped(average)
    return wrapped.eval()
