"""The layouts that `convert` writes: one small function each, from tensors and counters to what the library reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from polyak.files.layouts import LAYOUTS

from .material import Material, decay_of, diffusers_fields, first_names, num_copies, num_updates, separate, warm_up

# What timm, diffusers and others take where nothing is said.
_DECAY = 0.9999
# At its own settings, ema-pytorch has then come to the end of its warm-up: 1 - (1 + 1e6) ** (-2 / 3) = 0.9999.
_WARMED_UP = 1_000_000
_EMA_PYTORCH_COPIES = 100
# The first Lightning that has the callback. Later ones read its files; one that is older than a file warns.
_LIGHTNING = "2.6.0"
_DIFFUSERS_DEFAULTS = {"update_after_step": 0, "use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A layout that can be written.

    Attributes:
        name: what `to=` takes; polyak.read() finds the file to be of the layout of this name.
        kind: of file.
        content: what is in it: a dictionary for torch.save, or tensors by name.
        about: texts for the metadata of safetensors, or a configuration for the folder.
        stem: how the names of the files in a folder begin.
        is_positional: whether the tensors go without names, in the order of the model's parameters.
        keeps: which of "updates", "decay" and "raw" it has a place for.
    """

    name: str
    kind: Literal["torch", "safetensors", "folder"]
    content: Callable[[Material], dict[str, Any]]
    about: Callable[[Material], Mapping[str, Any] | None] | None = None
    stem: str = "model"
    is_positional: bool = False
    keeps: frozenset[str] = frozenset()


def _bare(material: Material) -> dict[str, Any]:
    return dict(material.average)


def _untied(material: Material) -> dict[str, Any]:
    """Tied tensors under the first of their names, as transformers saves them and ties them again."""
    found = first_names(material.average)
    if len(found) < len(material.average):
        others = len(material.average) - len(found)
        material.note(f"{others} tied names are left out, as transformers leaves them out")
    return dict(found)


def _timm(material: Material) -> dict[str, Any]:
    counters = material.checkpoint.counters
    content: dict[str, Any] = {"state_dict": _raw(material), "state_dict_ema": dict(material.average)}
    if "epoch" in counters:
        # Of version 2 the epoch is that which is over; timm goes on with the one after it.
        content |= {"epoch": int(counters["epoch"]), "version": 2}
    return content


def _torch(material: Material) -> dict[str, Any]:
    return {"n_averaged": _n_averaged(material), **_under("module.", material.average)}


def _ema_pytorch(material: Material) -> dict[str, Any]:
    step = num_copies(material.checkpoint)
    if step is None:
        step = _WARMED_UP
        material.note(f"the input has no number of updates; step is {step:,}, where the warm-up is over")
    elif step <= _EMA_PYTORCH_COPIES:
        material.note(
            f"step is {step}: up to its update_after_step, 100 unless you choose another, EMA copies the weights over "
            "the average"
        )
    return {
        "initted": torch.tensor(step > 0),
        "step": torch.tensor(step),
        **_under("online_model.", _raw(material)),
        **_under("ema_model.", material.average),
    }


def _torch_ema(material: Material) -> dict[str, Any]:
    # Lists are taken over as they are and updated in place, so that no tensor may stand in them twice.
    raw = material.raw or {}
    whole = all(name in raw for name in material.order)
    average = [(material.average if name in material.average else raw)[name] for name in material.order]
    both = separate([*average, *(raw[name] for name in material.order if whole)])
    count = len(material.order)
    steps = warm_up(material.checkpoint)
    if steps is None:
        material.note("num_updates is None: from now on the decay is constant, without a warm-up")
    return {
        "decay": _decay(material),
        "num_updates": steps,
        "shadow_params": both[:count],
        "collected_params": both[count:] if whole and count else None,
    }


def _lightning(material: Material) -> dict[str, Any]:
    counters = material.checkpoint.counters
    material.note(
        "the Trainer begins with a new optimizer and counts its steps from 0; the average goes on where it was"
    )
    if not material.has_model:
        material.note(
            "a LightningModule that keeps its model in an attribute has other names: polyak.convert(model=) takes it"
        )
    return {
        # Without the progress of its loops the Trainer's steps begin at 0, and updates at the first after this one.
        "callbacks": {"EMAWeightAveraging": {"latest_update_step": 0}},
        "state_dict": dict(material.average),
        "current_model_state": _raw(material),
        "averaging_state": {"n_averaged": _n_averaged(material)},
        "optimizer_states": [],
        "lr_schedulers": [],
        "epoch": int(counters.get("epoch", 0)),
        "global_step": int(counters.get("global_step", 0)),
        "pytorch-lightning_version": _LIGHTNING,
    }


def _diffusers_config(material: Material) -> Mapping[str, Any]:
    assert material.config is not None
    decay = _decay(material)
    given = diffusers_fields(material.checkpoint)
    steps = warm_up(material.checkpoint)
    fields: dict[str, Any] = {"decay": decay, **_DIFFUSERS_DEFAULTS}
    if given is not None:
        fields |= {name: type(value)(given.get(name, value)) for name, value in _DIFFUSERS_DEFAULTS.items()}
        fields |= {
            "min_decay": float(given.get("min_decay", 0)),
            "optimization_step": num_updates(material.checkpoint) or 0,
        }
    elif steps is not None:
        fields |= {"min_decay": 0.0, "optimization_step": steps + 1}
    else:
        # Its decay is (1 + s) / (10 + s) at first, unless the least one is as large as the largest.
        fields |= {"min_decay": decay, "optimization_step": max(num_updates(material.checkpoint) or 1, 1)}
        material.note("min_decay is decay: from now on the decay is constant, without a warm-up")
    return {**material.config, **fields}


def _config(material: Material) -> Mapping[str, Any] | None:
    if material.config is None:
        material.note("there is no config.json, which from_pretrained() looks for: put the model's there")
    return material.config


def _export_metadata(material: Material) -> Mapping[str, str] | None:
    """That of an export, where the input is one or knows as much."""
    profile = material.checkpoint.profiles.get(material.chosen)
    time, count = (material.checkpoint.counters.get(name) for name in ("time", "num_updates"))
    if profile is None or time is None or count is None:
        return None
    return {"profile": json.dumps(profile.describe()), "time": repr(float(time)), "num_updates": str(int(count))}


def _raw(material: Material) -> dict[str, Tensor]:
    if material.raw is None:
        note = "the input has no raw weights: where those go stands the average, and training goes on from it"
        material.note(note)
    return dict(material.average if material.raw is None else material.raw)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _n_averaged(material: Material) -> Tensor:
    count = num_copies(material.checkpoint)
    if count is None:
        count = 1
        material.note(
            "the input has no number of updates; n_averaged is set to 1: "
            "at 0 the next update would overwrite the average"
        )
    return torch.tensor(count)


def _decay(material: Material) -> float:
    known = decay_of(material.checkpoint, material.chosen)
    if material.decay is None and known is None:
        material.note(f"the input has no decay; {_DECAY} is written", needs=("decay",))
    return next(float(decay) for decay in (material.decay, known, _DECAY) if decay is not None)


_UPDATES = frozenset({"updates"})
_WRITERS: Mapping[str, Written] = {
    row.name: row
    for row in (
        Written(name="safetensors", kind="safetensors", content=_bare, about=_export_metadata),
        Written(name="plain", kind="torch", content=_bare),
        Written(name="huggingface", kind="folder", content=_untied, about=_config),
        Written(name="timm", kind="torch", content=_timm, keeps=frozenset({"raw"})),
        Written(name="torch", kind="torch", content=_torch, keeps=_UPDATES),
        Written(name="ema-pytorch", kind="torch", content=_ema_pytorch, keeps=_UPDATES | {"raw"}),
        Written(
            name="torch-ema",
            kind="torch",
            content=_torch_ema,
            is_positional=True,
            keeps=_UPDATES | {"decay", "raw"},
        ),
        Written(
            name="diffusers",
            kind="folder",
            content=_bare,
            about=_diffusers_config,
            stem="diffusion_pytorch_model",
            keeps=_UPDATES | {"decay"},
        ),
        Written(name="lightning", kind="torch", content=_lightning, keeps=_UPDATES | {"raw"}),
    )
}
# The table of layouts says which of them can be written.
WRITTEN: Mapping[str, Written] = {
    name: writer for name, writer in _WRITERS.items() if any(name in layout.written for layout in LAYOUTS)
}
