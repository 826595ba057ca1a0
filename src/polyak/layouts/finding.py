"""Which layout a file is of, and what that makes of it."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from polyak.containers import NO_PLAIN_TENSOR, Content, Leaf, Record, Stored
from polyak.errors import FileFormatError, listed
from polyak.names import canonical

from .layout import STEPS, WEIGHTS, Layout, Parts, Place
from .pattern import covers, items_of, matches, tensors, tie
from .positions import positions_to_names
from .table import LAYOUTS

ALONE = "average"
_NUMBERS = {
    "int64": "<q",
    "int32": "<i",
    "float32": "<f",
    "float64": "<d",
    "float16": "<e",
    "bool": "<?",
    "uint8": "<B",
}
# What modules that average register beside their tensors: torch, ema-pytorch.
_AVERAGES = ("n_averaged", "initted")
_UPDATES = ("n_averaged", "num_updates", "optimization_step")
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
    missing: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    layout: Layout
    under: tuple[str, ...] = ()

    @property
    def is_part(self) -> bool:
        """Whether it begins at a part of a model, and not at a key."""
        return bool(self.under) and self.under[-1].endswith(".")

    def uses(self, content: Content) -> frozenset[str]:
        """What of a file this one makes use of, beyond what anything else would."""
        layout = self.layout
        raw = [pattern for pattern in layout.raw if matches(content.tree, pattern, under=self.under)]
        # Keys are a file's own, and may look like patterns.
        under = [re.sub(r"[*#?{}]", "_", key) for key in self.under]
        inside = {"/".join((*under, part)) for part in (*layout.average[-1:], *layout.marks, *raw)}
        if self.under:
            inside |= {pattern for pattern in WEIGHTS if matches(content.tree, pattern)}
        extra = {f"<file {layout.file}>"} if layout.file else set[str]()
        extra |= {f"<test {layout.name}>"} if layout.test else set()
        return frozenset(inside | extra | {f"<about {key}>" for key in layout.about})


def _refines(ours: frozenset[str], theirs: frozenset[str]) -> bool:
    """Whether one makes use of all that the other one does, and of more."""

    def all_of(one: frozenset[str], two: frozenset[str]) -> bool:
        return all(any(covers(general, special) for special in one) for general in two)

    return all_of(ours, theirs) and not all_of(theirs, ours)


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
        MismatchError: as many names were given as there are not tensors.
    """
    chosen = _choose(content, format, layouts)
    layout, under = chosen.layout, chosen.under
    place = Place(content, under, tuple(tuple(given) for given in names))
    parts = Parts()
    if under:
        parts.notes.append(f"found under {'/'.join(under)!r}")
    if layout.remark:
        parts.notes.append(layout.remark)
    groups = _groups(layout, content.path) or {}
    parts.averages = _by_average(layout.average, content, under, groups.get("average") or "")
    left_out = _no_plain_tensors(layout.average, content, under)
    if left_out:
        parts.notes.append(f"left out, for they are no plain tensors: {listed(left_out)}")
    parts.raw = _first(layout.raw, content, under) if layout.beside is None else {}
    if not parts.raw and under:
        parts.raw = _around(content, under)
    if layout.beside is not None:
        _read_beside(parts, layout, content, groups, open_beside)
    parts.counters = _counters(layout, content, under, groups)
    parts.decay = _decay(layout, content, under, groups)
    if layout.code is not None:
        layout.code(parts, place)
    if any(parts.counters.get(name) == 0 for name in _UPDATES):
        parts.notes.append("nothing was averaged yet when it was saved")
    missing = list(left_out)
    if layout.is_positional:
        _name(parts, place, missing)
    for average in parts.averages.values():
        tie(average, like=parts.raw)
    averages = {name or ALONE: _bare(average, parts.notes) for name, average in parts.averages.items()}
    raw = _bare(parts.raw, parts.notes) if parts.raw else None
    lacking = {name for average in averages.values() for name in raw or () if name not in average}
    missing += [name for name in raw or () if name in lacking and averages and "names" not in missing]
    return Found(
        content=content,
        layout=layout,
        averages=averages,
        raw=raw,
        counters=parts.counters,
        decay=parts.decay,
        profiles={name or ALONE: profile for name, profile in parts.profiles.items()},
        missing=tuple(missing),
        notes=tuple(dict.fromkeys(parts.notes)),
    )


def _choose(content: Content, format: str | None, layouts: Sequence[Layout]) -> _Candidate:
    known = [layout.name for layout in layouts]
    if format is not None and format not in known:
        raise FileFormatError(f"format={format!r} is unknown; there are {', '.join(known)}")
    asked = [layout for layout in layouts if format in (None, layout.name)]
    places = _places(content)
    found = [
        candidate
        for layout in asked
        for candidate in (_Candidate(layout, under) for under in (places if layout.may_stand_in else places[:1]))
        if _fits(candidate, content)
    ]
    certain = [candidate for candidate in found if not candidate.layout.is_fallback]
    if not certain and found:
        return found[0]
    # A module that averages, as a part of another one, says least about the file.
    certain = [one for one in certain if not one.is_part] or certain
    uses = {one: one.uses(content) for one in certain}
    best = [one for one in certain if not any(_refines(uses[other], uses[one]) for other in certain)]
    # Of two readings of the very same things, the one that takes the file as a whole.
    best = [one for one in best if not one.under or all(other.under for other in best if uses[other] == uses[one])]
    if len(best) == 1:
        return best[0]
    keys = [key[:80] for key, _ in items_of(content.tree)]
    if best:
        texts = [f"{one.layout.name!r}{' under ' + repr('/'.join(one.under)) if one.under else ''}" for one in best]
        raise FileFormatError(
            f"{str(content.path)!r} could be of several formats: {' and '.join(texts)}. Choose one by format="
        )
    what = f"not of the format {format!r}" if format is not None else "of no known format"
    raise FileFormatError(f"{str(content.path)!r} is {what}; it has {listed(keys) or 'nothing'}")


def _places(content: Content) -> list[tuple[str, ...]]:
    """Where in a file a layout may begin: at the whole, at a key, or at a part of a model's names."""
    places: list[tuple[str, ...]] = [(), *((part,) for part in _parts(content.tree))]
    for key, value in items_of(content.tree):
        if isinstance(value, (dict, list)):
            places += [(key,), *((key, part) for part in _parts(cast("object", value)))]
    return places


def _parts(tree: object) -> list[str]:
    """The beginnings of the names of parts that are averages themselves, as modules that hold one have them."""
    names = [name.rpartition(".") for name, _ in items_of(tree)]
    return list(dict.fromkeys(f"{part}." for part, _, last in names if part and last in _AVERAGES))


def _fits(candidate: _Candidate, content: Content) -> bool:
    layout, under = candidate.layout, candidate.under
    if content.kind not in layout.kinds or _groups(layout, content.path) is None:
        return False
    if not all(key in content.about for key in layout.about):
        return False
    if layout.test is not None and not layout.test(Place(content, under)):
        return False
    if not all(matches(content.tree, mark, under=under) for mark in layout.marks):
        return False
    if layout.only_tensors and not all(
        value is None or isinstance(value, (Leaf, bool, int, float, str)) for _, value in items_of(content.tree)
    ):
        return False
    wanted = layout.average or (() if layout.marks or layout.test else layout.raw)
    return not wanted or any(tensors(matches(content.tree, pattern, under=under)) for pattern in wanted)


def _groups(layout: Layout, path: Path) -> dict[str, str | None] | None:
    """The groups of the pattern for the file's name; None where the name is another one."""
    if layout.file is None:
        return {}
    depth = layout.file.count("/") + 1
    found = re.fullmatch(layout.file, "/".join(path.absolute().parts[-depth:]))
    return None if found is None else found.groupdict()


def _by_average(
    patterns: Sequence[str], content: Content, under: tuple[str, ...], name: str
) -> dict[str, dict[str, Leaf]]:
    averages: dict[str, dict[str, Leaf]] = {}
    for pattern in patterns:
        for average, found in tensors(matches(content.tree, pattern, under=under)).items():
            kept = averages.setdefault(average or name, {})
            kept |= {key: leaf for key, leaf in found.items() if key not in kept}
    return averages


def _around(content: Content, under: tuple[str, ...]) -> dict[str, Leaf]:
    """The weights beside an average: in the same dictionary where it is a part, else in a neighbouring one."""
    *outer, part = under
    if not part.endswith("."):
        return _first(WEIGHTS, content, ())
    whole = _first(("*",), content, tuple(outer))
    return {name: leaf for name, leaf in whole.items() if not name.startswith(part)}


def _no_plain_tensors(patterns: Sequence[str], content: Content, under: tuple[str, ...]) -> list[str]:
    """Names of what is quantised, sparse or otherwise no plain numbers in an average."""
    found = [match for pattern in patterns for match in matches(content.tree, pattern, under=under)]
    return [
        match.key for match in found if isinstance(match.value, Record) and match.value.of.startswith(NO_PLAIN_TENSOR)
    ]


def _first(patterns: Sequence[str], content: Content, under: tuple[str, ...]) -> dict[str, Leaf]:
    for pattern in patterns:
        found = tensors(matches(content.tree, pattern, under=under)).get("", {})
        if found:
            return found
    return {}


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
    neighbour = max(found, key=lambda one: int(re.sub(r"\D", "", one.name) or 0))
    parts.raw = _first(layout.raw, open_beside(neighbour), ())
    parts.notes.append(f"the raw weights are those of {neighbour.name!r}, beside it")


def _counters(
    layout: Layout, content: Content, under: tuple[str, ...], groups: Mapping[str, str | None]
) -> dict[str, int | float]:
    found: dict[str, int | float] = {}
    tree = content.about if layout.about else content.tree
    around = [(pattern, ()) for pattern in STEPS if under]
    for pattern, inside in (*around, *((pattern, under) for pattern in layout.counters)):
        for match in matches(tree, pattern, under=inside):
            number = _number(match.value)
            if number is not None:
                found[re.split(r"[/.]", pattern)[-1]] = number
    named = {key: text for key, text in groups.items() if key not in _FROM_NAME and text is not None}
    return found | {key: int(text) for key, text in named.items()}


def _decay(layout: Layout, content: Content, under: tuple[str, ...], groups: Mapping[str, str | None]) -> float | None:
    if groups.get("decay"):
        return float(str(groups["decay"]))
    tree = content.about if layout.about else content.tree
    places = matches(tree, layout.decay, under=under) if layout.decay is not None else []
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


def _name(parts: Parts, place: Place, missing: list[str]) -> None:
    """Gives the tensors of lists their names, and says where nobody knows them."""
    for name, average in parts.averages.items():
        leaves = _in_order(average)
        known = {} if all(key.isdecimal() for key in parts.raw) else parts.raw
        names = positions_to_names([leaf.shape for leaf in leaves], known, place.names)
        if names is None:
            missing.append("names")
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
