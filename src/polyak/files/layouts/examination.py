"""From a path to what is in the file: which layout fits it, and what the layout finds."""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyak.errors import FileFormatError, MismatchError, PolyakError, listed
from polyak.files.containers import Content, Leaf, Reader, Record, Stored, damaged, open_content
from polyak.files.dtypes import DTYPES
from polyak.names import canonical, parts_around

from .choice import Candidate, choose, file_groups
from .layout import STEPS, WEIGHTS, Found, Layout, Place
from .odd import average_keys
from .pattern import matches, tensors, tie
from .positions import in_order, positions_to_names, stands_in
from .table import BY_NAME, LAYOUTS

_ALONE = "average"
_FROM_NAME = ("average", "decay", "stem")


def formats() -> dict[str, str]:
    """What `read(format=)` and `polyak inspect --format` take, each with what writes it.

    Example:
        >>> formats()["torch"]
        'torch AveragedModel'
    """
    return {layout.name: layout.writer for layout in LAYOUTS}


def examine(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    names: Sequence[Sequence[str]] = (),
    skip_objects: bool = False,
) -> Found:
    """Which layout a file is of and what it holds, without reading its tensors or running what is pickled in it.

    Args:
        path: a file or folder.
        format: the name of a layout; detected if omitted.
        names: lists of names of the model's parameters in order, of which one may fit.
        skip_objects: whether objects of unknown classes are skipped, without importing them, instead of refused.

    Raises:
        FileNotFoundError: there is nothing of that name.
        FileFormatError: it is damaged, hostile, of no known layout, or could be of two.
        MismatchError: the names are not as many as the tensors, or one is there twice.
    """
    if format is not None and format not in BY_NAME:
        raise FileFormatError(f"{format!r} is unknown; there are {', '.join(BY_NAME)}", argument="format")
    for given in names:
        twice = [name for name, count in Counter(given).items() if count > 1]
        if twice:
            raise MismatchError(f"the names have {listed(twice)} more than once")
    content = open_content(path, skip_objects=skip_objects)
    try:
        return find_layout(
            content,
            open_beside=lambda beside: open_content(beside, skip_objects=skip_objects),
            format=format,
            names=names,
        )
    except PolyakError as error:
        raise error.inside(repr(os.fspath(path))) from error.__cause__
    except OSError:
        raise
    # What a hostile file has in place of numbers, names and lists leads to any error.
    except Exception as error:
        raise damaged(path, error) from error


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
        open_beside: opens a neighbour, if the raw weights are in one.
        format: the name of a layout; detected if omitted.
        names: lists of names of the model's parameters in order, of which one may fit.
        layouts: the table.

    Raises:
        FileFormatError: none fits, or two do, neither of which says more than the other.
        MismatchError: there are other numbers of names and of tensors.
    """
    content, chosen = choose(content, format, layouts)
    orders = tuple(tuple(given) for given in names)
    every = [_found(one, Place(content, one.under, orders), open_beside) for one in chosen]
    found = every[0] if len(every) == 1 else _merged(every, [one.key for one in chosen])
    layout = found.layout
    used = {pattern.partition("/")[0] for pattern in (*layout.average, *layout.raw)}
    used |= {one.under[0] for one in chosen if one.under}
    passed_over = [key for key in average_keys(content) if key not in used]
    if passed_over and not layout.is_fallback:
        found = found.noted(f"passed over, though the keys speak of averages: {listed(passed_over)}")
    found = _bare(found)
    if found.raw and found.averages and found.has_names and not found.missing:
        found = _aligned(found)
    averages = {name: tie(average, like=found.raw) for name, average in found.averages.items()}
    lacking = {name for average in averages.values() for name in found.raw if name not in average}
    missing = [*found.missing, *(name for name in found.raw if name in lacking and found.has_names)]
    return replace(found, averages=averages, missing=tuple(dict.fromkeys(missing)))


def _found(chosen: Candidate, place: Place, open_beside: Callable[[Path], Content]) -> Found:
    """What a layout finds in a file."""
    layout, content = chosen.layout, place.content
    groups = file_groups(layout, content.path) or {}
    found = Found(
        content=content,
        layout=layout,
        averages=_by_average(layout.average, place, groups.get("average") or ""),
        counters=_counters(layout, place, groups),
        decay=_decay(layout, place, groups),
        missing=tuple(key for pattern in layout.average for key in _left_out(place, pattern)),
    )
    if place.under:
        found = found.noted(f"found under {chosen.key!r}", under=chosen.key)
    if layout.remark:
        found = found.noted(layout.remark)
    if found.missing:
        found = found.noted(f"left out, for they are no plain tensors: {listed(found.missing)}")
    found = _with_raw(found, place) if layout.beside is None else _with_neighbour(found, groups, open_beside)
    if layout.code is not None:
        found = layout.code(found, place)
    if layout.updates is not None and found.counters.get(layout.updates) == 0:
        found = found.noted("nothing was averaged yet when it was saved")
    return _named(found, place) if layout.is_positional else found


def _merged(every: Sequence[Found], keys: Sequence[str]) -> Found:
    """Averages of one layout under several keys, each by its key."""
    averages: dict[str, Mapping[str, Leaf]] = {}
    profiles: dict[str, Mapping[str, Any]] = {}
    counters: dict[str, int | float] = {}
    for key, found in zip(keys, every, strict=True):
        averages |= {f"{key}/{name}" if name else key: average for name, average in found.averages.items()}
        profiles |= {f"{key}/{name}" if name else key: profile for name, profile in found.profiles.items()}
        counters |= {f"{key}/{name}": count for name, count in found.counters.items()}
    decays = {found.decay for found in every}
    return replace(
        every[0],
        averages=averages,
        profiles=profiles,
        counters=counters,
        decay=decays.pop() if len(decays) == 1 else None,
        has_names=all(found.has_names for found in every),
        missing=tuple(name for found in every for name in found.missing),
        notes=tuple(dict.fromkeys(note for found in every for note in found.notes if note.under is None)),
    )


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


def _with_raw(found: Found, place: Place) -> Found:
    layout = found.layout
    own = _first(layout.raw, place)
    around = _around(place) if place.under and (layout.keeps_old_raw or not own) else {}
    if not (own and layout.keeps_old_raw):
        return replace(found, raw=own or around)
    (average,) = found.averages.values()
    if around and not stands_in(in_order(average), around.values()):
        return replace(found, raw=around)
    return replace(found, raw=own).noted(
        "the raw weights are what they were when the average was last put into the model"
    )


def _with_neighbour(found: Found, groups: Mapping[str, str | None], open_beside: Callable[[Path], Content]) -> Found:
    assert found.layout.beside is not None
    path = found.content.path.absolute()
    beside = [one for one in path.parent.glob(found.layout.beside.format(**groups)) if one != path]
    if not beside:
        return found
    neighbour = max(beside, key=lambda one: int(re.sub(r"\D", "", one.name)[-18:] or 0))
    without = f"no raw weights, for {neighbour.name!r} beside it cannot be read"
    try:
        raw = _first(found.layout.raw, Place(open_beside(neighbour)))
        return replace(found, raw=raw).noted(f"the raw weights are those of {neighbour.name!r}, beside it")
    except FileFormatError as error:
        return found.noted(f"{without}: {error.text}", needs=error.needs)
    except OSError as error:
        return found.noted(f"{without}: {error}")


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
    """A number, or the value of a tensor that has just one; None otherwise."""
    if isinstance(value, Stored) and value.shape in ((), (1,)):
        form = DTYPES[value.dtype].struct
        if form is not None:
            with Reader() as reader:
                return struct.unpack(f"<{form}", reader.read(value))[0]
    return value if isinstance(value, (int, float)) else None


def _named(found: Found, place: Place) -> Found:
    """Gives the tensors of lists their names, if anybody knows them."""
    averages = dict(found.averages)
    for name, average in found.averages.items():
        leaves = in_order(average)
        # Only torch.save keeps the order of a model.
        has_order = place.content.kind == "torch" and not all(key.isdecimal() for key in found.raw)
        known: Mapping[str, Leaf] = found.raw if has_order else {}
        names = positions_to_names([leaf.shape for leaf in leaves], known, place.names)
        if names is None:
            return replace(found, averages=averages, has_names=False).noted(
                "its tensors have no names, but positions", needs=("model", "names")
            )
        averages[name] = dict(zip(names, leaves, strict=True))
        if found.raw and not known and len(found.raw) == len(names):
            found = replace(found, raw=dict(zip(names, in_order(found.raw), strict=True)))
        if not place.names:
            found = found.noted("names by the order of the weights in the file, which have the same shapes")
    return replace(found, averages=averages)


def _bare(found: Found) -> Found:
    """Everything under the names that tensors have in the bare model, and averages by names that are not empty."""
    averages = {name or _ALONE: _without_wrappers(average) for name, average in found.averages.items()}
    raw = _without_wrappers(found.raw)
    changed = [*averages.values(), raw] != [*found.averages.values(), found.raw]
    profiles = {name or _ALONE: profile for name, profile in found.profiles.items()}
    found = replace(found, averages=averages, raw=raw, profiles=profiles)
    return found.noted("names without what wrappers put in them") if changed else found


def _without_wrappers(tensors: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
    names = {name: canonical(name) for name in tensors}
    if names and all(name.startswith("module.") for name in names.values()):
        names = {name: bare.removeprefix("module.") for name, bare in names.items()}
    if len(set(names.values())) != len(names) or "" in names.values():
        return tensors
    return {names[name]: leaf for name, leaf in tensors.items()}


def _aligned(found: Found) -> Found:
    """Averages and raw weights under the same names, if one of them is of a part of the other's model."""
    raw, names = found.raw, {name for average in found.averages.values() for name in average}
    if not names or names & raw.keys():
        return found
    for part in parts_around(next(iter(names)), raw):
        if all(part + name in raw for name in names):
            inside = {name.removeprefix(part): leaf for name, leaf in raw.items() if name.startswith(part)}
            return replace(found, raw=inside).noted(f"the raw weights are those of the part {part[:-1]!r}")
    for part in parts_around(next(iter(raw)), names):
        if all(part + name in names for name in raw):
            return replace(found, raw={part + name: leaf for name, leaf in raw.items()}).noted(
                f"the average is of a model that has the raw weights under {part[:-1]!r}"
            )
    return found.noted(f"the raw weights have no name in common with the average: {listed(list(raw)[:3])}, ...")
