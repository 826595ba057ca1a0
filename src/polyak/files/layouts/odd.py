"""What a row of the table cannot say: copies whose roles change, lost dots, averages that have to be computed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from polyak.errors import FileFormatError, MismatchError, listed
from polyak.files.containers import STATES, Between, Content, Leaf, Stored
from polyak.names import parts_around, renaming
from polyak.profiles import Power

from .layout import Found, Place
from .pattern import items_of, matches, tensors, tie
from .positions import positions_to_names

_AVERAGE_KEY = re.compile(r"(?:^|[_\-.])(?:ema|swa|average|averaged|avg|shadow|polyak)(?:$|[_\-.])", re.IGNORECASE)
_INNER_KEYS = ("module", "model", "shadow", "ema", "state_dict", "params", "weights", "average", "ema_model")
# Where trainers keep the state of an optimizer; the last one is Lightning's.
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "opt", "optimizer_states/0")
_TRAINING = ("ema_optimizer.", "optimizer.", "optim.", "dataloader.", "lr_scheduler.", "train_state.")


def composer(found: Found, place: Place) -> Found:
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
        inside = {**model, **tie(inside, like=model)}
    fields = dict(items_of(kept))
    old = _only(matches(kept, "training_model/*"))
    flags = {key: int(fields[key]) for key in ("ema_started", "ema_weights_active") if key in fields}
    found = replace(found, counters={**found.counters, **flags})
    if old:
        return replace(found, averages={"": _only(matches(kept, "ema_model/*"))}, raw=old)
    if fields.get("ema_weights_active") is True:
        return replace(found, averages={"": model}, raw=inside).noted(
            "ema_weights_active is set: the model in it is the average, and ema_model is what is trained"
        )
    return replace(found, averages={"": inside}, raw=model)


def edm2(found: Found, place: Place) -> Found:
    """Averages go by the relative standard deviation of their profile."""
    widths = [match.value for match in matches(place.content.tree, "ema/stds/#")]
    averages: dict[str, Mapping[str, Leaf]] = {}
    profiles: dict[str, Mapping[str, Any]] = {}
    for position, average in found.averages.items():
        width = widths[int(position)] if position.isdecimal() and int(position) < len(widths) else None
        if not isinstance(width, float):
            raise FileFormatError(f"is damaged: it has no standard deviation for its average {position!r}")
        averages[f"{width:.3f}"] = average
        profiles[f"{width:.3f}"] = Power(relative_std=width).describe()
    return replace(found, averages=averages, profiles=profiles)


def dotless(found: Found, place: Place) -> Found:
    """Names whose dots were taken out are found again among those of the raw weights, or of the model."""
    averages = {
        kept: {name: leaf for name, leaf in average.items() if name not in ("decay", "num_updates")}
        for kept, average in found.averages.items()
    }
    found = replace(found, averages=averages, raw=_without(found.raw, "model_ema."))
    # Mostly the average is of the part "model", and its names begin there.
    return _renamed(found, place, lambda name: (name.removeprefix("model.").replace(".", ""), name.replace(".", "")))


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


def dashed(found: Found, place: Place) -> Found:
    """Names whose dots are dashes are found again among those of the raw weights, or of the model."""

    # The average is of the part "net", and its names begin there.
    def change(name: str) -> tuple[str, ...]:
        bare = name.replace("_orig_mod.", "")
        return bare.removeprefix("net.").replace(".", "-"), bare.replace(".", "-")

    return _renamed(replace(found, raw=_without(found.raw, "ema.")), place, change)


def _without(tensors: Mapping[str, Leaf], prefix: str | tuple[str, ...]) -> dict[str, Leaf]:
    return {name: leaf for name, leaf in tensors.items() if not name.startswith(prefix)}


def _renamed(found: Found, place: Place, change: Callable[[str], tuple[str, ...]]) -> Found:
    """Gives tensors the names that become theirs by a change: those of the raw weights, or else of the model."""
    originals: dict[str, set[str]] = {}
    for name in found.raw or (name for names in place.names for name in names):
        for changed in change(name):
            originals.setdefault(changed, set()).add(name)
    averages: dict[str, Mapping[str, Leaf]] = {}
    for kept, average in found.averages.items():
        given = {name.replace("_orig_mod-", ""): leaf for name, leaf in average.items()}
        several = sorted(name for name in given if len(originals.get(name, ())) > 1)
        if several:
            shared = sorted(originals[several[0]])
            found = found.noted(f"left out, for several weights share one average: {listed(shared)}")
        unknown = [name for name in given if name not in originals]
        if unknown:
            found = found.noted(f"names as they are in the file, for no weight is called so: {listed(unknown)}")
        averages[kept] = {
            next(iter(originals[name])) if name in originals else name: leaf
            for name, leaf in given.items()
            if name not in several
        }
    return replace(found, averages=averages)


def only_averaged(found: Found, place: Place) -> Found:
    """The weights that are trained stand beside the average under their own names, among everything else."""
    return replace(found, raw=_without(found.raw, _TRAINING))


def has_ends(content: Content, under: tuple[str, ...]) -> bool:
    """Whether the state of an optimizer has a z for parameters."""
    return _optimizer(content.tree) is not None


def _optimizer(tree: object) -> str | None:
    """Where the state of an optimizer is that has a z for parameters."""
    return next((place for place in _OPTIMIZERS if matches(tree, f"{place}/state/?/z")), None)


def schedule_free(found: Found, place: Place) -> Found:
    """The average x of weights y and the optimizer's z: x = y + (1 - 1 / beta) * (z - y), beta being the first one."""
    optimizer = _optimizer(place.content.tree)
    groups = [dict(items_of(match.value)) for match in matches(place.content.tree, f"{optimizer}/param_groups/#")]
    if groups and isinstance(groups[0].get("k"), int):
        found = replace(found, counters={**found.counters, "k": groups[0]["k"]})
    # Buffers are the same in both; a parameter without z has not moved yet.
    average = dict(found.raw)
    without_raw = replace(found, averages={"": average}, raw={})
    # The wrapper of other optimizers keeps neither its mode nor its beta; those with a closure have one mode only.
    if groups and "train_mode" not in groups[0] and "weight_lr_power" not in groups[0]:
        return without_raw.noted(
            "ScheduleFreeWrapper does not save its mode: the model in it is the average only if it was saved in eval "
            "mode, and what is trained otherwise"
        )
    if not groups or groups[0].get("train_mode") is not True:
        return without_raw.noted(
            "saved in eval mode: the model in it is the average, and what was trained is not in it"
        )
    ends = {int(match.key): match.value for match in matches(place.content.tree, f"{optimizer}/state/*/z")}
    betas: dict[int, float] = {}
    for group in groups:
        first = dict(items_of(group.get("betas"))).get("0", group.get("momentum"))
        if not isinstance(first, float) or not 0 < first < 1:
            raise FileFormatError("is damaged: a group of its optimizer has no beta")
        betas |= {int(position): first for _, position in items_of(group.get("params"))}
    order = sorted(betas)
    shapes = [ends[position].shape if position in ends else None for position in order]
    names = positions_to_names(shapes, found.raw, place.names)
    if names is None:
        return found.noted("the names of the optimizer's parameters are needed", needs=("model", "names"))
    for position, name in zip(order, _names_in(found.raw, names), strict=True):
        start, end = found.raw.get(name), ends.get(position)
        if end is None:
            continue
        if start is None:
            raise MismatchError(f"has no weight {name!r}, of which its optimizer has a z")
        if not isinstance(start, Stored) or not isinstance(end, Stored) or start.shape != end.shape:
            raise FileFormatError(f"is damaged: z of {name!r} has not the form of its weight")
        average[name] = Between(start, end, 1 - 1 / betas[position])
        average |= {tied: average[name] for tied, leaf in found.raw.items() if leaf == start}
    return replace(found, averages={"": average})


def _names_in(raw: Mapping[str, Leaf], names: Sequence[str]) -> Sequence[str]:
    """Names of a model's parameters as they are in the file, where wrappers or a trainer's module change them."""
    rename = renaming(raw, names)
    found = {rename(name): name for name in raw}
    if all(name in found for name in names):
        return [found[name] for name in names]
    parts = [part for part in parts_around(names[0], raw) if all(part + name in raw for name in names)]
    return [f"{parts[0]}{name}" for name in names] if len(parts) == 1 else names


def polyak_export(found: Found, place: Place) -> Found:
    """The metadata have the profile."""
    about = place.content.about
    counters = {key: float(about[key]) if key == "time" else int(about[key]) for key in ("time", "num_updates")}
    return replace(found, counters=counters, profiles={"": json.loads(str(about["profile"]))})


def polyak_state(found: Found, place: Place) -> Found:
    """What is copied and not averaged stands in the state once, and belongs to each average; so do other names."""
    described = dict(items_of(_at(place, "configuration/profiles")))
    copies = _only(matches(place.content.tree, "copies/?/*", under=place.under))
    ties = {name: list(items_of(aliases)) for name, aliases in items_of(_at(place, "ties"))}
    averages: dict[str, Mapping[str, Leaf]] = {}
    profiles: dict[str, Mapping[str, Any]] = {}
    for name, kept in found.averages.items():
        average = {**kept, **copies}
        for first, aliases in ties.items():
            average.update({str(alias): average[first] for _, alias in aliases if first in average})
        averages[name] = average
        profile = described.get(name)
        if isinstance(profile, Mapping):
            profiles[name] = cast("Mapping[str, Any]", profile)
    found = replace(found, averages=averages, profiles=profiles)
    if any(growth for _, growth in items_of(_at(place, "pending"))):
        return found.noted("an update was not applied yet when it was saved; resuming applies it")
    return found


def accelerate_folder(found: Found, place: Place) -> Found:
    """The weights are those that are trained; averages are in files beside them, each a checkpoint by itself."""
    states = cast("list[str]", place.content.about[STATES])
    return found.noted(f"an average may be in {listed(states)} of this folder: read that file")


def has_average_key(content: Content, under: tuple[str, ...]) -> bool:
    """Whether a dictionary of tensors stands under a key that speaks of an average."""
    return bool(average_keys(content))


def any_key(found: Found, place: Place) -> Found:
    """Averages go by the keys that they stand under, where there are several."""
    averages = average_keys(place.content)
    one_or_all = averages if len(averages) > 1 else {"": next(iter(averages.values()))}
    return replace(found, averages=one_or_all).noted(f"taken for an average by its key: {listed(averages)}")


def weights_alone(found: Found, place: Place) -> Found:
    """Says what might be an average all the same."""
    suspects = [key for key, _ in items_of(place.content.tree) if _AVERAGE_KEY.search(key)]
    if suspects:
        found = found.noted(f"passed over, though the keys speak of averages: {listed(suspects)}")
    if "pytorch-lightning_version" in dict(items_of(place.content.tree)):
        found = found.noted(
            "a file of Lightning that has weights only: where a callback averages, they are the average after the end "
            "of the fit, and what is trained before"
        )
    return found


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
