"""Where in a file the tensors of an average are, and what else is in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from polyak.files.containers import Leaf, Record, parts_of

from .account import Other

_MAX_DEPTH = 32
_MAX_PLACES = 3
_MAX_TEXT = 200


@dataclass(frozen=True, slots=True)
class _Top:
    """What stands under one key of the file: its value, and the tensors that are found under it first."""

    key: str
    value: object
    leaves: tuple[Leaf, ...]


class Contents:
    """The tree of a file, each object of it visited once: it may hold itself, or the same thing many times over."""

    def __init__(self, tree: Mapping[Any, Any]) -> None:
        # By identity: the key it has, and what it stands in.
        self._places: dict[int, tuple[str, int | None]] = {id(tree): ("", None)}
        self._tops = [_Top(_text(key), value, tuple(self._visit(key, value, tree))) for key, value in tree.items()]

    def _visit(self, key: object, value: object, holder: object) -> Iterator[Leaf]:
        waiting = [(key, value, id(holder))]
        while waiting:
            key, value, holder_id = waiting.pop()
            if id(value) in self._places or not isinstance(value, (dict, list, tuple, Record, Leaf)):
                continue
            self._places[id(value)] = (_text(key), holder_id)
            if isinstance(value, Leaf):
                yield value
                continue
            inside = list(_inside(cast("Any", value)))
            waiting += ((name, part, id(value)) for name, part in reversed(inside))

    @property
    def leaves(self) -> list[Leaf]:
        """All tensors of the file."""
        return [leaf for top in self._tops for leaf in top.leaves]

    def where(self, tensors: Mapping[str, Leaf]) -> tuple[str, ...]:
        """The places of tensors, in the words of the table of layouts: "state_dict_ema/*", "model.*"."""
        inside: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        seen: set[int] = set()
        for name, leaf in tensors.items():
            for part in parts_of(leaf):
                path = self._path(part)
                if path and id(part) not in seen:
                    seen.add(id(part))
                    inside.setdefault(path[:-1], []).append((path[-1], name))
        texts = ["/".join((*path, _pattern(keys))) for path, keys in inside.items()]
        if len(texts) <= _MAX_PLACES:
            return tuple(texts)
        by_depth: dict[int, list[tuple[str, ...]]] = {}
        for path in inside:
            by_depth.setdefault(len(path), []).append(path)
        return tuple(_merged(paths, [inside[path] for path in paths]) for paths in by_depth.values())

    def _path(self, leaf: Leaf) -> tuple[str, ...]:
        path: list[str] = []
        place = self._places.get(id(leaf))
        while place is not None and place[1] is not None and len(path) < _MAX_DEPTH:
            path.append(place[0])
            place = self._places[place[1]]
        return tuple(reversed(path))

    def others(self, used: Iterable[Leaf], *, known: Iterable[str]) -> tuple[Other, ...]:
        """What is in the file beside tensors that are used, and values whose keys are known."""
        taken = {id(part) for leaf in used for part in parts_of(leaf)}
        passed = set(known)
        found: list[Other] = []
        loose: dict[str, list[Leaf]] = {}
        for top in self._tops:
            rest = [leaf for leaf in top.leaves if id(leaf) not in taken]
            if isinstance(top.value, Leaf):
                if rest:
                    first, dot, _ = top.key.partition(".")
                    loose.setdefault(f"{first}.*" if dot else first, []).extend(rest)
            elif rest or (not top.leaves and top.key not in passed):
                found.append(_other(top.key, _kind(top.value), rest))
        return (*found, *(_other(name, "tensors", leaves) for name, leaves in loose.items()))


def _other(name: str, kind: str, leaves: Sequence[Leaf]) -> Other:
    distinct = dict.fromkeys(leaves)
    return Other(name, kind, len(distinct), sum(leaf.num_bytes for leaf in distinct))


def _inside(value: dict[Any, Any] | list[Any] | tuple[Any, ...] | Record) -> Iterator[tuple[object, object]]:
    if isinstance(value, Record):
        yield "arguments", value.arguments
        yield "state", value.state
    elif isinstance(value, dict):
        yield from value.items()
    else:
        yield from enumerate(value)


def _text(key: object) -> str:
    """A key as text; what is neither a text nor a number by its type, for what it holds could be endless."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int) and abs(key) < 1 << 63 else f"<{type(key).__name__}>"


def _kind(value: object) -> str:
    """What a value is, in a few words and without what it holds."""
    match value:
        case Record():
            return value.of[:_MAX_TEXT]
        case dict() | list() | tuple():
            held = cast("list[Any]", value)
            return f"{type(held).__name__} of {len(held):,}"
        case str():
            return "text"
        case None:
            return "None"
        case _:
            return type(value).__name__


def _pattern(keys: Sequence[tuple[str, str]]) -> str:
    """What the keys of tensors have in common beside the tensors' names."""
    if len(keys) == 1 and keys[0][0] != keys[0][1]:
        return keys[0][0]
    if all(key.isdecimal() for key, _ in keys):
        return "#"
    prefixes = {key.removesuffix(name) for key, name in keys if key.endswith(name)}
    if len(prefixes) == 1 and all(key.endswith(name) for key, name in keys):
        return f"{prefixes.pop()}*"
    first, last = min(key for key, _ in keys), max(key for key, _ in keys)
    length = next((at for at, (one, two) in enumerate(zip(first, last, strict=False)) if one != two), len(first))
    return f"{first[: first.rfind('.', 0, length) + 1]}*"


def _merged(paths: Sequence[tuple[str, ...]], keys: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Places of one depth as one: what differs becomes a question mark, at the end a star."""
    parts = [names[0] if len(set(names)) == 1 else "?" for names in zip(*paths, strict=True)]
    last = {key for inside in keys for key, _ in inside}
    return "/".join((*parts, last.pop() if len(last) == 1 else "*"))
