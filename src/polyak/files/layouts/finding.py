"""What a file holds, once it is known of which layout it is."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak.errors import FileFormatError, listed
from polyak.files.containers import Content, Leaf, Record, Stored
from polyak.names import canonical, parts_around

from .choosing import Candidate, choose, file_groups
from .layout import STEPS, WEIGHTS, Layout, Parts, Place
from .odd import average_keys
from .pattern import matches, tensors, tie
from .positions import positions_to_names
from .standing import stands_in
from .table import LAYOUTS

_ALONE = "average"
_NUMBERS = {
    "int64": "<q",
    "int32": "<i",
    "float32": "<f",
    "float64": "<d",
    "float16": "<e",
    "bool": "<?",
    "uint8": "<B",
}
_UPDATES = ("n_averaged", "num_updates", "optimization_step", "steps")
_FROM_NAME = ("average", "decay", "stem")


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds, tensors not read yet."""

    content: Content
    layout: Layout
    averages: dict[str, dict[str, Leaf]]
    raw: dict[str, Leaf] | None
    counters: dict[str, int | float]
    decay: float | None
    profiles: dict[str, Mapping[str, Any]]
    has_names: bool
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def find_layout(
    content: Content,
    *,
    open_beside: Callable[[Path], Content],
    format: str | None = None,
    names: Sequence[Sequence[str]] = (),
    layouts: Sequence[Layout] = LAYOUTS,
) -> Found:
    """What a file holds, by the layout that fits it: the one that asks most of it.

    Args:
        content: the file.
        open_beside: opens a neighbour, where the raw weights are in one.
        format: the name of a layout, where it shall not be found out.
        names: lists of names of the model's parameters in order, of which one may fit.
        layouts: the table.

    Raises:
        FileFormatError: none fits, or two do, neither of which says more than the other.
        MismatchError: there are other numbers of names and of tensors.
    """
    content, chosen = choose(content, format, layouts)
    found = [_parts(content, one, open_beside, names) for one in chosen]
    parts = found[0]
    if len(found) > 1:
        parts = _merge(found, [one.key for one in chosen])
    used = {pattern.partition("/")[0] for pattern in (*chosen[0].layout.average, *chosen[0].layout.raw)}
    used |= {one.under[0] for one in chosen if one.under}
    passed_over = [key for key in average_keys(content) if key not in used]
    if passed_over and not chosen[0].layout.is_fallback:
        parts.notes.append(f"passed over, though the keys speak of averages: {listed(passed_over)}")
    averages = {name or _ALONE: _bare(average, parts.notes) for name, average in parts.averages.items()}
    raw = _bare(parts.raw, parts.notes) if parts.raw else None
    if raw and averages and parts.has_names and not parts.missing:
        averages, raw = _align(averages, raw, parts.notes)
    for average in averages.values():
        tie(average, like=raw or {})
    lacking = {name for average in averages.values() for name in raw or () if name not in average}
    missing = [*parts.missing, *(name for name in raw or () if name in lacking and parts.has_names)]
    return Found(
        content=content,
        layout=chosen[0].layout,
        averages=averages,
        raw=raw,
        counters=parts.counters,
        decay=parts.decay,
        profiles={name or _ALONE: profile for name, profile in parts.profiles.items()},
        has_names=parts.has_names,
        missing=tuple(dict.fromkeys(missing)),
        notes=tuple(dict.fromkeys(parts.notes)),
    )


def _parts(
    content: Content,
    chosen: Candidate,
    open_beside: Callable[[Path], Content],
    names: Sequence[Sequence[str]],
) -> Parts:
    """What a layout finds in a file."""
    layout, under = chosen.layout, chosen.under
    place = Place(content, under, tuple(tuple(given) for given in names))
    parts = Parts()
    if under:
        parts.notes.append(f"found under {chosen.key!r}")
    if layout.remark:
        parts.notes.append(layout.remark)
    groups = file_groups(layout, content.path) or {}
    parts.averages = _by_average(layout.average, place, groups.get("average") or "")
    parts.missing = [key for pattern in layout.average for key in _left_out(place, pattern)]
    if parts.missing:
        parts.notes.append(f"left out, for they are no plain tensors: {listed(parts.missing)}")
    if layout.beside is not None:
        _read_beside(parts, layout, content, groups, open_beside)
    else:
        _read_raw(parts, layout, place)
    parts.counters = _counters(layout, place, groups)
    parts.decay = _decay(layout, place, groups)
    if layout.code is not None:
        layout.code(parts, place)
    if any(parts.counters.get(name) == 0 for name in _UPDATES):
        parts.notes.append("nothing was averaged yet when it was saved")
    if layout.is_positional:
        _name(parts, place)
    return parts


def _merge(found: Sequence[Parts], keys: Sequence[str]) -> Parts:
    """Averages of one layout under several keys, each by its key."""
    merged = Parts(raw=found[0].raw)
    for key, parts in zip(keys, found, strict=True):
        merged.averages |= {f"{key}/{name}" if name else key: average for name, average in parts.averages.items()}
        merged.profiles |= {f"{key}/{name}" if name else key: profile for name, profile in parts.profiles.items()}
        merged.counters |= {f"{key}/{name}": count for name, count in parts.counters.items()}
        merged.notes += [note for note in parts.notes if not note.startswith("found under")]
        merged.missing += parts.missing
        merged.has_names = merged.has_names and parts.has_names
    decays = {parts.decay for parts in found}
    merged.decay = decays.pop() if len(decays) == 1 else None
    return merged


def _by_average(patterns: Sequence[str], place: Place, name: str) -> dict[str, dict[str, Leaf]]:
    averages: dict[str, dict[str, Leaf]] = {}
    for pattern in patterns:
        for average, found in tensors(matches(place.content.tree, pattern, under=place.under)).items():
            kept = averages.setdefault(average or name, {})
            kept |= {key: leaf for key, leaf in found.items() if key not in kept}
    return averages


def _left_out(place: Place, pattern: str) -> Iterator[str]:
    """Names of what is in an average and is no tensor of plain numbers: quantised, sparse, of another library."""
    for match in matches(place.content.tree, pattern, under=place.under):
        if isinstance(match.value, Record):
            yield match.key


def _around(place: Place) -> dict[str, Leaf]:
    """The weights beside an average: in the same dictionary where it is a part, else in a neighbouring one."""
    *outer, part = place.under
    if part.endswith("."):
        whole = _first(("*",), Place(place.content, tuple(outer)))
        rest = {name: leaf for name, leaf in whole.items() if not name.startswith(part)}
        if rest or not outer:
            return rest
        part = outer[-1]
    return _first([pattern for pattern in WEIGHTS if pattern.partition("/")[0] != part], Place(place.content))


def _first(patterns: Sequence[str], place: Place) -> dict[str, Leaf]:
    for pattern in patterns:
        found = tensors(matches(place.content.tree, pattern, under=place.under)).get("", {})
        if found:
            return found
    return {}


def _read_raw(parts: Parts, layout: Layout, place: Place) -> None:
    own = _first(layout.raw, place)
    around = _around(place) if place.under and (layout.keeps_old_raw or not own) else {}
    parts.raw = own or around
    if own and layout.keeps_old_raw:
        (average,) = parts.averages.values()
        if around and not stands_in(_in_order(average), around.values()):
            parts.raw = around
        else:
            parts.notes.append("the raw weights are what they were when the average was last put into the model")


def _read_beside(
    parts: Parts,
    layout: Layout,
    content: Content,
    groups: Mapping[str, str | None],
    open_beside: Callable[[Path], Content],
) -> None:
    assert layout.beside is not None
    path = content.path.absolute()
    found = [one for one in path.parent.glob(layout.beside.format(**groups)) if one != path]
    if not found:
        return
    neighbour = max(found, key=lambda one: int(re.sub(r"\D", "", one.name)[-18:] or 0))
    try:
        parts.raw = _first(layout.raw, Place(open_beside(neighbour)))
        parts.notes.append(f"the raw weights are those of {neighbour.name!r}, beside it")
    except (FileFormatError, OSError) as error:
        parts.notes.append(f"no raw weights, for {neighbour.name!r} beside it cannot be read: {error}")


def _counters(layout: Layout, place: Place, groups: Mapping[str, str | None]) -> dict[str, int | float]:
    found: dict[str, int | float] = {}
    tree = place.content.about if layout.about else place.content.tree
    around = [(pattern, ()) for pattern in STEPS if place.under]
    for pattern, inside in (*around, *((pattern, place.under) for pattern in layout.counters)):
        for match in matches(tree, pattern, under=inside):
            number = _number(match.value)
            if number is not None:
                found[re.split(r"[/.]", pattern)[-1]] = number
    named = {key: text for key, text in groups.items() if key not in _FROM_NAME and text is not None}
    return found | {key: int(text) for key, text in named.items()}


def _decay(layout: Layout, place: Place, groups: Mapping[str, str | None]) -> float | None:
    if groups.get("decay"):
        return float(str(groups["decay"]))
    tree = place.content.about if layout.about else place.content.tree
    places = matches(tree, layout.decay, under=place.under) if layout.decay is not None else []
    number = _number(places[0].value) if places else None
    return None if number is None else float(number)


def _number(value: object) -> int | float | None:
    """A number, or that of a tensor which holds just one; what is none of these counts nothing."""
    if isinstance(value, Stored) and value.shape in ((), (1,)) and value.dtype in _NUMBERS:
        form = _NUMBERS[value.dtype]
        size = struct.calcsize(form)
        with value.span.path.open("rb") as file:
            file.seek(value.span.offset + value.start * size)
            return struct.unpack(form, file.read(size))[0]
    return value if isinstance(value, (int, float)) else None


def _name(parts: Parts, place: Place) -> None:
    """Gives the tensors of lists their names, and says where nobody knows them."""
    for name, average in parts.averages.items():
        leaves = _in_order(average)
        # Only torch.save keeps the order of a model.
        has_order = place.content.kind == "torch" and not all(key.isdecimal() for key in parts.raw)
        known = parts.raw if has_order else {}
        names = positions_to_names([leaf.shape for leaf in leaves], known, place.names)
        if names is None:
            parts.has_names = False
            parts.notes.append("its tensors have no names, but positions: give model= or names=")
            return
        parts.averages[name] = dict(zip(names, leaves, strict=True))
        if parts.raw and not known and len(parts.raw) == len(names):
            parts.raw = dict(zip(names, _in_order(parts.raw), strict=True))
        if not place.names:
            parts.notes.append("names by the order of the weights in the file, which have the same shapes")


def _in_order(by_position: Mapping[str, Leaf]) -> list[Leaf]:
    return [by_position[position] for position in sorted(by_position, key=int)]


def _bare(tensors: Mapping[str, Leaf], notes: list[str]) -> dict[str, Leaf]:
    """Tensors under the names that they have in the bare model."""
    names = {name: canonical(name) for name in tensors}
    if names and all(name.startswith("module.") for name in names.values()):
        names = {name: bare.removeprefix("module.") for name, bare in names.items()}
    if len(set(names.values())) != len(names) or "" in names.values():
        return dict(tensors)
    if any(name != bare for name, bare in names.items()):
        notes.append("names without what wrappers put in them")
    return {names[name]: leaf for name, leaf in tensors.items()}


def _align(
    averages: dict[str, dict[str, Leaf]], raw: dict[str, Leaf], notes: list[str]
) -> tuple[dict[str, dict[str, Leaf]], dict[str, Leaf]]:
    """Averages and raw weights under the same names, where one of them is of a part of the other's model."""
    names = {name for average in averages.values() for name in average}
    if not names or names & raw.keys():
        return averages, raw
    for part in parts_around(next(iter(names)), raw):
        if all(part + name in raw for name in names):
            notes.append(f"the raw weights are those of the part {part[:-1]!r}")
            inside = {name.removeprefix(part): leaf for name, leaf in raw.items() if name.startswith(part)}
            return averages, inside
    for part in parts_around(next(iter(raw)), names):
        if all(part + name in names for name in raw):
            notes.append(f"the average is of a model that has the raw weights under {part[:-1]!r}")
            return averages, {part + name: leaf for name, leaf in raw.items()}
    notes.append(f"the raw weights have no name in common with the average: {listed(list(raw)[:3])}, ...")
    return averages, raw
