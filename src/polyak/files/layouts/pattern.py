"""Where something is in a tree of dictionaries and lists, said as briefly as in a table.

"state_dict_ema/*"              every tensor in the dictionary "state_dict_ema"; * is its name
"ema_models.{}.ema_model.*"     names with a prefix in the dictionary itself; {} is the name of the average
"shadow_params/#"               the tensors of a list; # is the position
"callbacks/?/n_averaged"        whatever the key in place of ? is
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from polyak.files.containers import Leaf, Record

_SPECIAL = re.compile(r"(\*|\{\}|#|\?)")
_MEANING = {"*": "(?P<key>.+)", "{}": "(?P<average>[^.]+)", "#": r"(?P<position>\d+)", "?": "[^.]+"}


@dataclass(frozen=True, slots=True)
class Match:
    """Something that a pattern leads to."""

    value: Any
    average: str = ""
    key: str = ""


def matches(tree: object, pattern: str, *, under: tuple[str, ...] = ()) -> list[Match]:
    """What is in a tree at the places that a pattern tells, in the tree's order.

    Args:
        tree: dictionaries and lists; a list is a dictionary by position.
        pattern: as above.
        under: keys that lead to where the pattern begins; one that ends in a dot is how names begin, as those of a part
            of a model.

    Example:
        >>> matches({"ema": {"a.weight": 1, "a.bias": 2}}, "ema/a.*")
        [Match(value=1, average='', key='weight'), Match(value=2, average='', key='bias')]
    """
    for key in under:
        tree = _within(tree, key)
    return list(_search(tree, tuple(pattern.split("/")), "", ""))


def _within(tree: object, key: str) -> object:
    if not key.endswith("."):
        # At once, where it can be: a file may have as many keys as it likes.
        known = cast("dict[object, object]", tree) if isinstance(tree, dict) else dict[object, object](items_of(tree))
        return known.get(key)
    return {name.removeprefix(key): value for name, value in items_of(tree) if name.startswith(key)}


def _search(tree: object, segments: tuple[str, ...], average: str, key: str) -> Iterator[Match]:
    if not segments:
        yield Match(tree, average, key)
        return
    first, *rest = segments
    if not _SPECIAL.search(first):
        for name, value in items_of(tree):
            if name == first:
                yield from _search(value, tuple(rest), average, key)
        return
    if "*" in first and isinstance(tree, (list, tuple)):
        return  # what has a position has no name
    form = _compiled(first)
    for name, value in items_of(tree):
        found = form.fullmatch(name)
        if found is not None:
            groups = found.groupdict()
            yield from _search(
                value, tuple(rest), groups.get("average") or average, groups.get("key") or groups.get("position") or key
            )


@cache
def _compiled(segment: str) -> re.Pattern[str]:
    # By itself it is a whole key, which may have dots in it.
    if segment in ("?", "{}"):
        return re.compile("(?P<average>.+)" if segment == "{}" else ".+", re.DOTALL)
    parts = _SPECIAL.split(segment)
    return re.compile("".join(_MEANING.get(part, re.escape(part)) for part in parts), re.DOTALL)


def items_of(tree: object) -> Iterator[tuple[str, Any]]:
    """The items of a dictionary, list or record by text, as far as they have such names."""
    if isinstance(tree, Record):
        yield from ((str(key), value) for key, value in tree.items.items())
        tree = tree.state
    if isinstance(tree, Mapping):
        for key, value in cast("Mapping[object, Any]", tree).items():
            if isinstance(key, (str, int)):
                yield str(key), value
    elif isinstance(tree, (list, tuple)):
        for place, value in enumerate(cast("list[Any]", tree)):
            yield str(place), value


def tensors(found: list[Match]) -> dict[str, dict[str, Leaf]]:
    """The tensors among what a pattern led to, by average and name."""
    averages: dict[str, dict[str, Leaf]] = {}
    for match in found:
        if isinstance(match.value, Leaf):
            averages.setdefault(match.average, {})[match.key] = match.value
    return averages


def tie(tensors: Mapping[str, Leaf], *, like: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Tensors, also under the names that they are tied to, if those are the same tensor elsewhere in the file.

    Example:
        >>> tied = object()
        >>> tie({"a": 1}, like={"a": tied, "b": tied, "c": object()})
        {'a': 1, 'b': 1}
    """
    known = {leaf: name for name, leaf in like.items() if name in tensors}
    also = {name: tensors[known[leaf]] for name, leaf in like.items() if name not in tensors and leaf in known}
    return {**tensors, **also}


def covers(general: str, special: str) -> bool:
    """Whether all that one pattern leads to, another one leads to as well.

    Example:
        >>> covers("ema/*", "ema/module.*"), covers("ema/module.*", "ema/*")
        (True, False)
    """
    parts = _SPECIAL.split(general)
    form = "".join(".+" if part in _MEANING else re.escape(part) for part in parts)
    return re.fullmatch(form, special, re.DOTALL) is not None
