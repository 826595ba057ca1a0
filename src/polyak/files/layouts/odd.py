"""What a row of the table cannot say: copies whose roles change, lost dots, averages that have to be computed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from polyak.errors import FileFormatError, MismatchError, listed
from polyak.files.containers import STATES, Between, Content, Leaf, Stored
from polyak.names import parts_around, renaming
from polyak.profiles import Power

from .layout import Parts, Place
from .pattern import items_of, matches, tensors, tie
from .positions import positions_to_names

_AVERAGE_KEY = re.compile(r"(?:^|[_\-.])(?:ema|swa|average|averaged|avg|shadow|polyak)(?:$|[_\-.])", re.IGNORECASE)
_INNER_KEYS = ("module", "model", "shadow", "ema", "state_dict", "params", "weights", "average", "ema_model")
# Where trainers keep the state of an optimizer; the last one is Lightning's.
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "opt", "optimizer_states/0")
_TRAINING = ("ema_optimizer.", "optimizer.", "optim.", "dataloader.", "lr_scheduler.", "train_state.")


def composer(parts: Parts, place: Place) -> None:
    """The flag says which copy the model is; the algorithm's own dictionary has the other one."""
    algorithms = [match.value for match in matches(place.content.tree, "state/algorithms/?")]
    kept = next(dict(items_of(entry)).get("1") for entry in algorithms if dict(items_of(entry)).get("0") == "EMA")
    model = _only(matches(place.content.tree, "state/model/*"))
    inside = {
        **_only(matches(kept, "ema_model/named_parameters_dict/*")),
        **_only(matches(kept, "ema_model/named_buffers_dict/*")),
    }
    # What is not averaged is the same in both, and is kept once; a tied name goes with the name that it is tied to.
    if inside:
        tie(inside, like=model)
        inside = {**model, **inside}
    fields = dict(items_of(kept))
    old = _only(matches(kept, "training_model/*"))
    if old:
        parts.averages, parts.raw = {"": _only(matches(kept, "ema_model/*"))}, old
    elif fields.get("ema_weights_active") is True:
        parts.averages, parts.raw = {"": model}, inside
        parts.notes.append(
            "ema_weights_active is set: the model in it is the average, and ema_model is what is trained"
        )
    else:
        parts.averages, parts.raw = {"": inside}, model
    parts.counters |= {key: int(fields[key]) for key in ("ema_started", "ema_weights_active") if key in fields}


def edm2(parts: Parts, place: Place) -> None:
    """Averages go by the relative standard deviation of their profile."""
    widths = [match.value for match in matches(place.content.tree, "ema/stds/#")]
    averages: dict[str, dict[str, Leaf]] = {}
    for position, average in parts.averages.items():
        width = widths[int(position)] if position.isdecimal() and int(position) < len(widths) else None
        if not isinstance(width, float):
            raise FileFormatError(f"is damaged: it has no standard deviation for its average {position!r}")
        averages[f"{width:.3f}"] = average
        parts.profiles[f"{width:.3f}"] = Power(relative_std=width).describe()
    parts.averages = averages


def dotless(parts: Parts, place: Place) -> None:
    """Names whose dots were taken out are found again among those of the raw weights, or of the model."""
    for average in parts.averages.values():
        average.pop("decay", None)
        average.pop("num_updates", None)
    parts.raw = {name: leaf for name, leaf in parts.raw.items() if not name.startswith("model_ema.")}
    # Mostly the average is of the part "model", and its names begin there.
    _rename(parts, place, lambda name: (name.removeprefix("model.").replace(".", ""), name.replace(".", "")))


def is_outermost(content: Content, under: tuple[str, ...]) -> bool:
    """Whether what begins with the layout's own word is its average, and not a module that averages, so called."""
    return not any(
        matches(content.tree, f"{word}.{mark}", under=under)
        for word in ("ema_model", "model_ema")
        for mark in ("initted", "n_averaged")
    )


def has_dashes(content: Content, under: tuple[str, ...]) -> bool:
    """Whether names have dashes in place of dots."""
    names = [match.key for match in matches(content.tree, "ema.*", under=under)]
    return any("-" in name for name in names) and not any("." in name for name in names)


def dashed(parts: Parts, place: Place) -> None:
    """Names whose dots are dashes are found again among those of the raw weights, or of the model."""
    parts.raw = {name: leaf for name, leaf in parts.raw.items() if not name.startswith("ema.")}

    # The average is of the part "net", and its names begin there.
    def change(name: str) -> tuple[str, ...]:
        bare = name.replace("_orig_mod.", "")
        return bare.removeprefix("net.").replace(".", "-"), bare.replace(".", "-")

    _rename(parts, place, change)


def _rename(parts: Parts, place: Place, change: Callable[[str], tuple[str, ...]]) -> None:
    """Gives tensors the names that become theirs by a change: those of the raw weights, or else of the model."""
    originals: dict[str, set[str]] = {}
    for name in parts.raw or (name for names in place.names for name in names):
        for changed in change(name):
            originals.setdefault(changed, set()).add(name)
    for kept, average in parts.averages.items():
        given = {name.replace("_orig_mod-", ""): leaf for name, leaf in average.items()}
        several = sorted(name for name in given if len(originals.get(name, ())) > 1)
        if several:
            shared = sorted(originals[several[0]])
            parts.notes.append(f"left out, for several weights share one average: {listed(shared)}")
        unknown = [name for name in given if name not in originals]
        if unknown:
            parts.notes.append(f"names as they are in the file, for no weight is called so: {listed(unknown)}")
        parts.averages[kept] = {
            next(iter(originals[name])) if name in originals else name: leaf
            for name, leaf in given.items()
            if name not in several
        }


def only_averaged(parts: Parts, place: Place) -> None:
    """The weights that are trained stand beside the average under their own names, among everything else."""
    parts.raw = {name: leaf for name, leaf in parts.raw.items() if not name.startswith(_TRAINING)}


def has_ends(content: Content, under: tuple[str, ...]) -> bool:
    """Whether the state of an optimizer has a z for parameters."""
    return _optimizer(content.tree) is not None


def _optimizer(tree: object) -> str | None:
    """Where the state of an optimizer is that has a z for parameters."""
    return next((place for place in _OPTIMIZERS if matches(tree, f"{place}/state/?/z")), None)


def schedule_free(parts: Parts, place: Place) -> None:
    """The average x of weights y and the optimizer's z: x = y + (1 - 1 / beta) * (z - y), beta being the first one."""
    optimizer = _optimizer(place.content.tree)
    groups = [dict(items_of(match.value)) for match in matches(place.content.tree, f"{optimizer}/param_groups/#")]
    if groups and isinstance(groups[0].get("k"), int):
        parts.counters["k"] = groups[0]["k"]
    # Buffers are the same in both; a parameter without z has not moved yet.
    average = dict(parts.raw)
    parts.averages = {"": average}
    # The wrapper of other optimizers keeps neither its mode nor its beta; those with a closure have one mode only.
    if groups and "train_mode" not in groups[0] and "weight_lr_power" not in groups[0]:
        parts.raw = {}
        parts.notes.append(
            "ScheduleFreeWrapper does not save its mode: the model in it is the average only if it was saved in eval "
            "mode, and what is trained otherwise"
        )
        return
    if not groups or groups[0].get("train_mode") is not True:
        parts.raw = {}
        parts.notes.append("saved in eval mode: the model in it is the average, and what was trained is not in it")
        return
    ends = {int(match.key): match.value for match in matches(place.content.tree, f"{optimizer}/state/*/z")}
    betas: dict[int, float] = {}
    for group in groups:
        first = dict(items_of(group.get("betas"))).get("0", group.get("momentum"))
        if not isinstance(first, float) or not 0 < first < 1:
            raise FileFormatError("is damaged: a group of its optimizer has no beta")
        betas |= {int(position): first for _, position in items_of(group.get("params"))}
    order = sorted(betas)
    shapes = [ends[position].shape if position in ends else None for position in order]
    names = positions_to_names(shapes, parts.raw, place.names)
    if names is None:
        parts.averages = {}
        parts.notes.append("the names of the optimizer's parameters are needed: give model= or names=")
        return
    for position, name in zip(order, _names_in(parts.raw, names), strict=True):
        start, end = parts.raw.get(name), ends.get(position)
        if end is None:
            continue
        if start is None:
            raise MismatchError(f"has no weight {name!r}, of which its optimizer has a z")
        if not isinstance(start, Stored) or not isinstance(end, Stored) or start.shape != end.shape:
            raise FileFormatError(f"is damaged: z of {name!r} has not the form of its weight")
        average[name] = Between(start, end, 1 - 1 / betas[position])
        average |= {tied: average[name] for tied, leaf in parts.raw.items() if leaf == start}


def _names_in(raw: Mapping[str, Leaf], names: Sequence[str]) -> Sequence[str]:
    """Names of a model's parameters as they are in the file, where wrappers or a trainer's module change them."""
    rename = renaming(raw, names)
    found = {rename(name): name for name in raw}
    if all(name in found for name in names):
        return [found[name] for name in names]
    parts = [part for part in parts_around(names[0], raw) if all(part + name in raw for name in names)]
    return [f"{parts[0]}{name}" for name in names] if len(parts) == 1 else names


def polyak_export(parts: Parts, place: Place) -> None:
    """The metadata have the profile."""
    about = place.content.about
    parts.counters = {key: float(about[key]) if key == "time" else int(about[key]) for key in ("time", "num_updates")}
    parts.profiles = {"": json.loads(str(about["profile"]))}


def polyak_state(parts: Parts, place: Place) -> None:
    """What is copied and not averaged stands in the state once, and belongs to each average; so do other names."""
    described = dict(items_of(_at(place, "configuration/profiles")))
    copies = _only(matches(place.content.tree, "copies/?/*", under=place.under))
    ties = {name: list(items_of(aliases)) for name, aliases in items_of(_at(place, "ties"))}
    for name, average in parts.averages.items():
        average.update(copies)
        for first, aliases in ties.items():
            average.update({str(alias): average[first] for _, alias in aliases if first in average})
        profile = described.get(name)
        if isinstance(profile, Mapping):
            parts.profiles[name] = cast("Mapping[str, Any]", profile)
    if any(growth for _, growth in items_of(_at(place, "pending"))):
        parts.notes.append("an update was not applied yet when it was saved; resuming applies it")


def accelerate_folder(parts: Parts, place: Place) -> None:
    """The weights are those that are trained; averages are in files beside them, each a checkpoint by itself."""
    states = cast("list[str]", place.content.about[STATES])
    parts.notes.append(f"an average may be in {listed(states)} of this folder: read that file")


def has_average_key(content: Content, under: tuple[str, ...]) -> bool:
    """Whether a dictionary of tensors stands under a key that speaks of an average."""
    return bool(average_keys(content))


def any_key(parts: Parts, place: Place) -> None:
    """Averages go by the keys that they stand under, where there are several."""
    found = average_keys(place.content)
    parts.averages = found if len(found) > 1 else {"": next(iter(found.values()))}
    parts.notes.append(f"taken for an average by its key: {listed(found)}")


def weights_alone(parts: Parts, place: Place) -> None:
    """Says what might be an average all the same."""
    suspects = [key for key, _ in items_of(place.content.tree) if _AVERAGE_KEY.search(key)]
    if suspects:
        parts.notes.append(f"passed over, though the keys speak of averages: {listed(suspects)}")
    if "pytorch-lightning_version" in dict(items_of(place.content.tree)):
        parts.notes.append(
            "a file of Lightning that has weights only: where a callback averages, they are the average after the end "
            "of the fit, and what is trained before"
        )


def average_keys(content: Content) -> dict[str, dict[str, Leaf]]:
    """Dictionaries of tensors under keys that speak of an average, or in a dictionary there."""
    found: dict[str, dict[str, Leaf]] = {}
    for key, value in items_of(content.tree):
        if _AVERAGE_KEY.search(key):
            patterns = ("*", *(f"{word}/*" for word in _INNER_KEYS))
            inner = [inside for pattern in patterns if (inside := _only(matches(value, pattern)))]
            found[key] = inner[0] if inner else {}
    return {key: average for key, average in found.items() if average}


def _at(place: Place, pattern: str) -> Any:
    return next((match.value for match in matches(place.content.tree, pattern, under=place.under)), None)


def _only(found: Iterable[Any]) -> dict[str, Leaf]:
    return tensors(list(found)).get("", {})
