"""Which layouts a file is of: those that ask most of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from polyak.errors import FileFormatError, listed
from polyak.files.containers import Content, Leaf

from .layout import WEIGHTS, Layout
from .pattern import covers, items_of, matches, tensors

# What modules that average register beside their tensors: torch, ema-pytorch.
_AVERAGES = ("n_averaged", "initted")
_MAX_DEPTH = 3
_MAX_INSIDE = 32
_MAX_PLACES = 1000
# Dictionaries that hold all the rest.
_AROUND = ("checkpoint", "ckpt", "state", "app", "train_state", "training_state")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout, and the keys under which it begins."""

    layout: Layout
    under: tuple[str, ...] = ()

    def is_part_of(self, content: Content) -> bool:
        """Whether it begins at a part of a model, and not at a key, nor where a wrapper is around all of it."""
        if not self.under or not self.under[-1].endswith("."):
            return False
        *outer, part = self.under
        return not all(match.key.startswith(part) for match in matches(content.tree, "*", under=tuple(outer)))

    @property
    def key(self) -> str:
        """The keys under which it begins, as one name."""
        return "/".join(self.under).rstrip(".")

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
        extra |= {f"<test {layout.test.__name__}>"} if layout.test else set()
        return frozenset(inside | extra | {f"<about {key}>" for key in layout.about})


def choose(
    content: Content, format: str | None, layouts: Sequence[Layout], *, around: str | None = None
) -> tuple[Content, list[Candidate]]:
    """The layouts of a file, each with where it begins: one, or several of the same layout under different keys.

    Args:
        content: the file.
        format: the name of a layout; detected if omitted.
        layouts: the table.
        around: the key of the dictionary that holds all the rest, once it is looked into.

    Returns:
        The file, or the part of it that a dictionary around all the rest holds, and what was chosen.

    Raises:
        FileFormatError: none fits, or two do, neither of which says more than the other.
    """
    asked = [layout for layout in layouts if format in (None, layout.name)]
    places = _places(content)
    found = [
        candidate
        for layout in asked
        for candidate in (Candidate(layout, under) for under in (places if layout.may_stand_in else places[:1]))
        if _fits(candidate, content)
    ]
    certain = [candidate for candidate in found if not candidate.layout.is_fallback]
    if certain:
        return content, _best(certain, content)
    if found:
        return content, found[:1]
    inner = [key for key, value in items_of(content.tree) if key in _AROUND and isinstance(value, dict)]
    if len(inner) == 1:
        return choose(replace(content, tree=content.tree[inner[0]]), format, layouts, around=inner[0])
    keys = [key[:80] for key, _ in items_of(content.tree)]
    what = f"not of the format {format!r}" if format is not None else "of no known format"
    where = "" if around is None else f"under {around!r} "
    raise FileFormatError(f"is {what}; {where}it has {listed(keys) or 'nothing'}")


def _best(certain: list[Candidate], content: Content) -> list[Candidate]:
    # A module that averages, as a part of another one, says least about the file.
    certain = [one for one in certain if not one.is_part_of(content)] or certain
    uses = {one: one.uses(content) for one in certain}
    best = [one for one in certain if not any(_refines(uses[other], uses[one]) for other in certain)]
    # Of two readings of the very same things, the one that takes the file as a whole.
    best = [one for one in best if not one.under or all(other.under for other in best if uses[other] == uses[one])]
    if len({one.layout.name for one in best}) == 1 and (len(best) == 1 or all(one.under for one in best)):
        return best
    texts = [f"{one.layout.name!r}{f' under {one.key!r}' if one.under else ''}" for one in best]
    raise FileFormatError(f"could be of several formats: {' and '.join(texts)}", needs=("format",))


def _refines(ours: frozenset[str], theirs: frozenset[str]) -> bool:
    """Whether one makes use of all that the other one does, and of more."""

    def all_of(one: frozenset[str], two: frozenset[str]) -> bool:
        return all(any(covers(general, special) for special in one) for general in two)

    return all_of(ours, theirs) and not all_of(theirs, ours)


def _places(content: Content) -> list[tuple[str, ...]]:
    """Where in a file a layout may begin: at the whole, at keys, or at a part of a model's names."""
    places: list[tuple[str, ...]] = [(), *((part,) for part in _parts(content.tree))]
    level: list[tuple[tuple[str, ...], object]] = [((), content.tree)]
    for _ in range(_MAX_DEPTH):
        inside = [((*under, key), value) for under, tree in level for key, value in _few_dictionaries(under, tree)]
        level = inside[: max(0, _MAX_PLACES - len(places))]
        places += [place for key, tree in level for place in (key, *((*key, part) for part in _parts(tree)))]
    return places


def _few_dictionaries(under: tuple[str, ...], tree: object) -> list[tuple[str, object]]:
    """Those in a tree, such as the states of Lightning's callbacks; many are those of an optimizer's parameters."""
    found = [(key, cast("object", value)) for key, value in items_of(tree) if isinstance(value, dict)]
    return found if not under or len(found) <= _MAX_INSIDE else []


def _parts(tree: object) -> list[str]:
    """The beginnings of the names of parts that are averages themselves, as modules that hold one have them."""
    names = [name.rpartition(".") for name, _ in items_of(tree)]
    return list(dict.fromkeys(f"{part}." for part, _, last in names if part and last in _AVERAGES))


def _fits(candidate: Candidate, content: Content) -> bool:
    layout, under = candidate.layout, candidate.under
    if content.kind not in layout.kinds or file_groups(layout, content.path) is None:
        return False
    if not all(key in content.about for key in layout.about):
        return False
    if not all(matches(content.tree, mark, under=under) for mark in layout.marks):
        return False
    if layout.test is not None and not layout.test(content, under):
        return False
    if layout.only_tensors and not all(
        value is None or isinstance(value, (Leaf, bool, int, float, str)) for _, value in items_of(content.tree)
    ):
        return False
    wanted = layout.average or (() if layout.marks or layout.test else layout.raw)
    return not wanted or any(tensors(matches(content.tree, pattern, under=under)) for pattern in wanted)


def file_groups(layout: Layout, path: Path) -> dict[str, str | None] | None:
    """The groups of the pattern for the file's name; None where the name is another one."""
    if layout.file is None:
        return {}
    depth = layout.file.count("/") + 1
    found = re.fullmatch(layout.file, "/".join(path.absolute().parts[-depth:]))
    return None if found is None else found.groupdict()
