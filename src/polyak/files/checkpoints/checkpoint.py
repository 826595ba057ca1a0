"""What `read` returns: the averages of a file, as tensors mapped from it, and what else is in it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from polyak.errors import FileFormatError, listed
from polyak.files.containers import Between, Leaf, Pieced, Span, Stored
from polyak.files.dtypes import DTYPES
from polyak.files.layouts import Found, Note
from polyak.profiles import Profile, profile_from_description

_MAX_PARTS = 1_000


class Pages:
    """Files mapped into memory: reading touches the pages that are asked for, writing changes a private copy."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._storages: dict[Span, Tensor] = {}

    def hold(self, path: Path) -> None:
        """Keeps the bytes of a file that is about to be removed."""
        self._map(path)

    def tensor(self, leaf: Leaf) -> Tensor:
        """The tensor that a file describes. Those of one storage share memory."""
        match leaf:
            case Stored():
                return self._stored(leaf)
            case Pieced():
                whole = torch.empty(leaf.shape, dtype=_dtype(leaf.dtype))
                for offset, piece in leaf.pieces:
                    place = tuple(slice(at, at + count) for at, count in zip(offset, piece.shape, strict=True))
                    whole[place] = self._stored(piece)
                return whole
            case Between():
                return torch.lerp(self._stored(leaf.start), self._stored(leaf.end), leaf.weight)

    def _stored(self, stored: Stored) -> Tensor:
        dtype = _dtype(stored.dtype)
        storage = self._storage(stored.span)
        size = DTYPES[stored.dtype].num_bytes
        if stored.span.offset % size:
            storage = storage.clone()
        usable = stored.span.num_bytes - stored.span.num_bytes % size
        return storage[:usable].view(dtype).as_strided(stored.shape, stored.stride, stored.start)

    def _storage(self, span: Span) -> Tensor:
        if span not in self._storages:
            if span.num_bytes == 0:
                return torch.empty(0, dtype=torch.uint8)
            mapped = self._map(span.path)
            if len(mapped) < span.offset + span.num_bytes:
                raise FileFormatError(f"{str(span.path)!r} has become shorter since it was opened")
            self._storages[span] = torch.frombuffer(mapped, dtype=torch.uint8, count=span.num_bytes, offset=span.offset)
        return self._storages[span]

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


class Tensors(Mapping[str, Tensor]):
    """Tensors of a file by name. A tensor is made when it is asked for; its numbers are read when they are used.

    Tensors are on the CPU, mapped from the file: do not change the file in place while they are used. Writing to them
    changes neither the file nor each other, but for those which share memory in the file.
    """

    def __init__(self, leaves: Mapping[str, Leaf], pages: Pages) -> None:
        self._leaves = leaves
        self._pages = pages

    def __getitem__(self, name: str) -> Tensor:
        return self._pages.tensor(self._leaves[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def __contains__(self, name: object) -> bool:
        return name in self._leaves

    def __repr__(self) -> str:
        return f"<{len(self)} tensors, {self.num_bytes:,} bytes>"

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, those that several names share counted once."""
        return sum(leaf.num_bytes for leaf in set(self._leaves.values()))

    def leaf(self, name: str) -> Leaf:
        """What is known about a tensor without reading it: dtype, shape, place in the file."""
        return self._leaves[name]


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise FileFormatError(f"a tensor has the dtype {name}, which this version of torch does not have")
    return dtype


@dataclass(frozen=True, repr=False, eq=False)
class Checkpoint:
    """The averages of a checkpoint, whichever library wrote it: what was found, with tensors made on demand."""

    _found: Found
    _pages: Pages

    @property
    def path(self) -> Path:
        """Of the file or folder."""
        return self._found.content.path

    @property
    def format(self) -> str:
        """The layout that it was read by."""
        return self._found.layout.name

    @cached_property
    def averages(self) -> Mapping[str, Tensors]:
        """Tensors by the name of the average and the name in the bare model. A single one is called "average"."""
        return {name: Tensors(average, self._pages) for name, average in self._found.averages.items()}

    @cached_property
    def raw_weights(self) -> Tensors | None:
        """The weights that were trained, if the file has them."""
        return Tensors(self._found.raw, self._pages) if self._found.raw else None

    @property
    def counters(self) -> Mapping[str, int | float]:
        """Numbers that say how far the training was, by the names that the library gives them."""
        return self._found.counters

    @property
    def decay(self) -> float | None:
        """The decay of the average, if the file has it."""
        return self._found.decay

    @cached_property
    def profiles(self) -> Mapping[str, Profile]:
        """The profiles of the averages, if the file has them."""
        return {name: self._profile(description) for name, description in self._found.profiles.items()}

    @property
    def has_names(self) -> bool:
        """Whether the averages go by names; if not, by positions, because the file has no names and none were given."""
        return self._found.has_names

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that the raw weights or the model have and an average lacks."""
        return self._found.missing

    @property
    def notes(self) -> tuple[Note, ...]:
        """What else a user should know of it, as strings."""
        return self._found.notes

    def choose(self, name: str | None = None) -> str:
        """The name of an average that is there: the given one, or that of the only one.

        Raises:
            FileFormatError: there is none, or no such one, or there are several and none was given.
        """
        names, path = list(self.averages), repr(str(self.path))
        if not names:
            raise FileFormatError(f"{path} has no average, but only raw weights")
        if name is not None and name not in names:
            raise FileFormatError(f"{name!r} is not in {path}, which has {listed(names)}", argument="average")
        if name is None and len(names) > 1:
            raise FileFormatError(f"{path} has several averages, {listed(names)}", needs=("average",))
        return names[0] if name is None else name

    @property
    def average(self) -> Tensors:
        """The average, if there is just one.

        Raises:
            FileFormatError: there is none, or several; take one of `averages`.
        """
        return self.averages[self.choose()]

    def weights(self, average: str | None = None) -> dict[str, Tensor]:
        """All of the model's tensors: the average, and the raw weights' own for what is missing in it.

        Raw weights that have no name in common with the average are those of another model, and give nothing.

        Args:
            average: its name; needed if there are several.

        Raises:
            FileFormatError: there is none, or no such one, or there are several and none was given.
        """
        chosen = self.averages[self.choose(average)]
        raw: Mapping[str, Tensor] = self.raw_weights or {}
        return {**raw, **chosen} if raw.keys() & chosen.keys() else dict(chosen)

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}: {self.format}>"

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}"]
        lines += [f"  average {name!r}: {tensors!r}" for name, tensors in self.averages.items()]
        lines += [] if self.raw_weights is None else [f"  raw weights: {self.raw_weights!r}"]
        lines += [f"  {name}: {value}" for name, value in self.counters.items()]
        lines += [] if self.decay is None else [f"  decay: {self.decay}"]
        lines += [f"  profile of {name!r}: {profile}" for name, profile in self.profiles.items()]
        lines += [f"  missing in the average: {listed(self.missing)}"] if self.missing else []
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _profile(self, description: Mapping[str, object]) -> Profile:
        if not _is_small(description):
            raise FileFormatError(f"{str(self.path)!r} has a profile that is none")
        try:
            return profile_from_description(description)
        except ValueError as error:
            raise FileFormatError(f"{str(self.path)!r} has a profile that is none: {error}") from error


def _is_small(value: object) -> bool:
    """Whether a value can be shown in an error: what contains itself, or the same again and again, may have no end."""
    left, count = [value], 0
    while left and count < _MAX_PARTS:
        part, count = left.pop(), count + 1
        if isinstance(part, (dict, list, tuple)):
            inner = cast("Any", part)
            left += inner.values() if isinstance(inner, dict) else inner
    return not left
