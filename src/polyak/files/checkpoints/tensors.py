"""Tensors of a file by name, each made when it is asked for, from the file's own pages."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from polyak.errors import FileFormatError
from polyak.files.containers import Between, Leaf, Pieced, Span, Stored
from polyak.files.dtypes import DTYPES


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
