"""The state of a `WeightAverage`: for resuming, bit for bit, under the configuration that it was saved with.

    {"format": "polyak.WeightAverage", "version": 1,
     "configuration": {"profiles": {name: description}, "every": int, "start": float, "dtypes": [str]},
     "clock": {...}, "pending": {name: float}, "ties": {name: [alias]}, "frozen": {name: checksum or None},
     "averages": {fingerprint: {name: {tensor name: tensor}}}, "copies": {fingerprint: {tensor name: tensor}}}

With compensated=True there are "seconds", like "averages", and the configuration says so. If averages are rounded
stochastically, the configuration has the seed and the version of the random bits.

The fingerprint of the configuration stands in the path of every tensor, because a loader that reads into live tensors
(torch.distributed.checkpoint does) would otherwise have overwritten them before anyone could compare configurations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from polyak.errors import FileFormatError, MismatchError, StateError, listed
from polyak.kernels import copy_, is_plain
from polyak.model import check_same_names
from polyak.ranks import describe, is_sharded, local, sharding_of
from polyak.store import Ledger

from .clock import Clock
from .core import Core

FORMAT = "polyak.WeightAverage"
VERSION = 1


def save_state(core: Core) -> dict[str, Any]:
    """The state, whose tensors are the averages themselves."""
    ledger = core.ledger()
    configuration = _configuration(core)
    fingerprint = _fingerprint(core, configuration)
    loose = {entry.name for entry in core.source.entries if entry.is_loose}
    copies = [name for name in core.store.copies if name not in loose]
    names = set(core.store.names)
    averages = {
        profile: _lasting(core, {name: t for name, t in core.store.tensors(profile).items() if name in names})
        for profile in core.profiles
    }
    tensors = core.store.tensors(next(iter(core.profiles)))
    seconds = {"seconds": {fingerprint: {name: _wrapped(core, kept) for name, kept in core.store.seconds.items()}}}
    return {
        "format": FORMAT,
        "version": VERSION,
        "configuration": configuration,
        "clock": _saved_clock(core.clock, ledger),
        "pending": dict(zip(core.profiles, ledger.pending, strict=True)),
        "ties": {entry.name: list(entry.aliases) for entry in core.source.entries if entry.aliases},
        "frozen": core.source.saved_sums,
        "averages": {fingerprint: averages},
        "copies": {fingerprint: _lasting(core, {name: tensors[name] for name in copies})},
        **(seconds if core.store.modes.compensated else {}),
    }


def _lasting(core: Core, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the store that stay what they are when a swap ends: what stands in the source now is copied."""
    return _wrapped(core, tensors if core.swapped is None else {name: t.clone() for name, t in tensors.items()})


def _wrapped(core: Core, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name as they lie over the ranks."""
    lies = core.store.lies
    return {name: t if (sharding := lies[name]) is None else sharding.wrap(t) for name, t in tensors.items()}


def load_state(core: Core, state: Mapping[str, Any]) -> None:
    """Checks a state against what is here, whole, and takes it over."""
    _check_format(state)
    configuration = _configuration(core)
    _check_draw(state["configuration"], configuration)
    if state["configuration"] != configuration:
        raise StateError(
            "the state was saved with another configuration and cannot be continued under this one: "
            f"{_explain(state['configuration'], configuration)}. Make the WeightAverage as it was then"
        )
    fingerprint = _fingerprint(core, configuration)
    clock, made, since = _read_clock(core.clock, state["clock"])
    try:
        pending = {name: float(state["pending"][name]) for name in core.profiles}
        given = {name: _dictionary(state["averages"][fingerprint][name]) for name in core.profiles}
        copies = _dictionary(state.get("copies", {}).get(fingerprint, {}))
        compensated = list(core.profiles) if core.store.modes.compensated else []
        seconds = {name: _dictionary(state["seconds"][fingerprint][name]) for name in compensated}
        ties = {str(name): [str(alias) for alias in aliases] for name, aliases in state.get("ties", {}).items()}
        totals = state.get("frozen", {}).items()
        frozen = {str(name): None if total is None else int(total) for name, total in totals}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the state is damaged: {type(error).__name__}: {error}") from error
    if any(not growth >= 0 for growth in pending.values()):
        raise FileFormatError(f"the state is damaged: its pending growth is {pending}")
    loose = {entry.name for entry in core.source.entries if entry.is_loose}
    kept_copies = {name: tensor for name, tensor in core.store.copies.items() if name not in loose}
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    sets = [(core.store.averages[name], given[name], f"average {name!r}") for name in core.profiles]
    sets += [(core.store.seconds[name], seconds[name], f"second terms of {name!r}") for name in compensated]
    for kept, found, what in [*sets, (kept_copies, copies, "copies")]:
        matched = _match(core, kept, found, ties, what)
        apart = [name for name in kept if not _is_same(kept[name], matched[name])]
        targets += [kept[name] for name in apart]
        sources += [matched[name] for name in apart]
    core.store.updates.settle()
    with torch.no_grad():
        copy_(targets, sources)
    core.go_on(clock, core.store.updates.resume(Ledger(tuple(pending.values()), made, since)))
    core.begin()
    # The model may be loaded before this state or after: what is frozen must then be what it was when that was saved.
    core.source.resume_sums(frozen)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same memory, as after a loader that reads in place."""
    steps = zip(one.shape, one.stride(), other.stride(), strict=True)
    return one.data_ptr() == other.data_ptr() and all(size == 1 or a == b for size, a, b in steps)


def _configuration(core: Core) -> dict[str, Any]:
    averages = next(iter(core.store.averages.values()))
    return {
        "profiles": {name: profile.describe() for name, profile in core.profiles.items()},
        "every": core.clock.every,
        "start": core.clock.start,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in averages.values()}),
        **core.store.modes.configuration,
    }


def _fingerprint(core: Core, configuration: Mapping[str, Any]) -> str:
    text = json.dumps([FORMAT, VERSION, configuration], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if core.source.flat_rank is None:
        return digest
    # Tensors that torch.distributed.checkpoint would take for the same on all ranks, and save once.
    rank, size = core.source.flat_rank
    return f"{digest}-rank-{rank}-of-{size}"


def _check_format(state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # it may come from any file
        raise FileFormatError(f"a state is a dictionary, as state_dict() gives it, not {type(state).__name__}")
    if state.get("format") != FORMAT:
        raise FileFormatError(
            f"this is no state of a WeightAverage; its keys are {listed(state)}. A dictionary of weights goes into the "
            "model, by model.load_state_dict()"
        )
    if state.get("version") != VERSION:
        raise FileFormatError(f"the state has version {state.get('version')!r}; this polyak reads version {VERSION}")
    if not isinstance(state.get("configuration", {}), Mapping):
        raise FileFormatError(f"the state is damaged: its configuration is {state['configuration']!r}")
    # Empty dictionaries get lost in some files, such as those of torch's dcp_to_torch_save.
    missing = {"configuration", "clock", "pending", "averages"} - state.keys()
    if missing:
        raise FileFormatError(f"the state is damaged: it has no {listed(sorted(missing))}")


def _check_draw(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises a StateError if averages are rounded stochastically on both sides, by different random bits."""
    if "seed" not in saved or "seed" not in here or saved.get("draw", 1) == here["draw"]:
        return
    raise StateError(
        "the state was saved by a version of polyak that drew other random bits for averages in 16 bits (draw "
        f"{saved.get('draw', 1)!r}, here {here['draw']}), so it cannot be continued bit for bit. Nothing was written. "
        "Read its weights by polyak.read(file).weights(), and make a new WeightAverage of a model that holds them"
    )


def _saved_clock(clock: Clock, ledger: Ledger) -> dict[str, Any]:
    """What changes as the clock runs, as plain data. `updated_at` is the time from which the next growth counts."""
    return {
        "axis": clock.axis,
        "time": clock.time,
        "updated_at": ledger.since,
        "num_calls": clock.num_calls,
        "num_updates": ledger.made,
    }


def _read_clock(clock: Clock, saved: Any) -> tuple[Clock, int, float]:
    """The clock, how many updates were made, and the time from which the next growth counts."""
    try:
        if not isinstance(saved, dict):
            raise TypeError
        given = cast("dict[str, Any]", saved)
        axis, time, since, num_calls, made = (given[key] for key in _saved_clock(clock, Ledger(())))
        right = all(type(each) is float for each in (time, since)) and all(type(n) is int for n in (num_calls, made))
        right = right and axis in (None, "calls", "at") and 0 <= since <= time < math.inf
        right = right and 0 <= made <= num_calls and len(given) == 5
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the state is damaged: its clock is {saved!r}") from error
    if not right:
        raise FileFormatError(f"the state is damaged: its clock is {saved!r}")
    return clock._replace(axis=axis, time=time, num_calls=num_calls), made, since


def _dictionary(value: object) -> dict[str, Tensor]:
    items = cast("Mapping[object, object]", value).items() if isinstance(value, Mapping) else [(0, value)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise TypeError("something stands where tensors by name should be")
    return cast("dict[str, Tensor]", value)


def _explain(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    keys = [key for key in {**here, **saved} if saved.get(key) != here.get(key)]
    was, now = ({key: repr(each[key]) if key in each else "not set" for key in keys} for each in (saved, here))
    return "; ".join(f"{key} was {was[key]} and is {now[key]}" for key in keys)


def _match(
    core: Core, kept: Mapping[str, Tensor], found: Mapping[str, Tensor], ties: Mapping[str, list[str]], what: str
) -> dict[str, Tensor]:
    """The saved tensors under the names that they have here, after names, shapes and dtypes were checked."""
    first_names = {alias: entry.name for entry in core.source.entries for alias in (entry.name, *entry.aliases)}
    renamed = {first_names.get(name, name): tensor for name, tensor in found.items()}
    tied = {name: (first, *others) for first, others in ties.items() for name in (first, *others)}
    names_here = {entry.name: (entry.name, *entry.aliases) for entry in core.source.entries}
    check_same_names(
        {first_names.get(name, name): tied.get(name, (name,)) for name in found},
        {name: names_here[name] for name in kept},
        given_by="the state",
        wanted_by="the model",
    )
    if len(renamed) != len(found):
        raise MismatchError(
            f"tensors that are tied in the model are several in the {what} of the state: {listed(found)}"
        )
    return {name: _part(core, name, tensor, renamed[name], what) for name, tensor in kept.items()}


def _part(core: Core, name: str, kept: Tensor, saved: Tensor, what: str) -> Tensor:
    """What belongs here of a saved tensor, after it was checked; a whole one is cut."""
    here = core.store.lies[name]
    wrapped = kept if here is None else here.wrap(kept)
    if not is_plain(local(saved)):
        raise FileFormatError(f"the state is damaged: {name!r} in the {what} of the state is no plain tensor")
    if saved.shape != wrapped.shape or saved.dtype != kept.dtype:
        raise MismatchError(
            f"{name!r} in the {what} of the state is {tuple(saved.shape)} {saved.dtype}, and "
            f"{tuple(wrapped.shape)} {kept.dtype} here. Nothing was written"
        )
    if is_sharded(saved) and sharding_of(saved) != sharding_of(wrapped):
        raise MismatchError(
            f"{name!r} in the {what} of the state is {describe(sharding_of(saved))}, and "
            f"{describe(sharding_of(wrapped))} here. Nothing was written. Save and load it by "
            "torch.distributed.checkpoint, which lays it over other ranks"
        )
    if is_sharded(saved) and here is not None and cast("Any", sharding_of(saved)).label != here.label:
        raise MismatchError(
            f"{name!r} in the {what} of the state is another rank's part. Nothing was written. A file of torch.save "
            "holds those of the rank that wrote it; save and load by torch.distributed.checkpoint"
        )
    return local(saved) if is_sharded(saved) or here is None else here.cut(saved)
