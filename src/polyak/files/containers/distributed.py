"""Folders of `torch.distributed.checkpoint`: a pickled index, and files with the pieces of each tensor.

The library reads the index by running what is pickled in it, so here it is read as data. Each piece is a small archive
of `torch.save` by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, cast

from polyak.errors import FileFormatError
from polyak.files.dtypes import DTYPES

from .archive import MAX_PICKLE, read_archive
from .objects import find
from .pickled import Name, unpickle
from .stored import Leaf, Pieced, Record, Stored

INDEX = ".metadata"
# Of a thousand ranks there are so many pieces.
_MAX_OPERATIONS = 100_000_000
# Of a piece, by the name of its tensor and where it begins: the file, and the stretch of it.
_Places = dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]


def read_distributed(folder: Path, *, skip_objects: bool) -> dict[Any, Any]:
    """The content of a folder, nested as it was saved; but for the numbers that an optimizer has for each parameter."""
    size = (folder / INDEX).stat().st_size
    if size > MAX_PICKLE:
        raise FileFormatError(f"has an index of {size:,} bytes, which no checkpoint needs")
    with BytesIO((folder / INDEX).read_bytes()) as file:
        index = unpickle(
            file,
            find=lambda name: find(name, skip_objects=False),
            persistent=_refuse,
            max_operations=_MAX_OPERATIONS,
        )
    described = _state(index, "Metadata")
    places: _Places = {}
    for key, place in described["storage_data"].items():
        at, where = _state(key, "MetadataIndex"), _state(place, "_StorageInfo")
        if where.get("transform_descriptors"):
            raise FileFormatError("is compressed, which is not read; load it with torch.distributed.checkpoint")
        offset = tuple(_state(at["offset"])) if at.get("offset") is not None else ()
        places[at["fqn"], offset] = (where["relative_path"], where["offset"], where["length"])
    paths = described.get("planner_data")
    tree: dict[Any, Any] = {}
    for name, entry in described["state_dict_metadata"].items():
        path = _path(name, paths)
        if not isinstance(entry, Record):
            raise FileFormatError("is damaged: its index has another form")
        if entry.of.endswith(".TensorStorageMetadata"):
            _put(tree, path, _tensor(folder, name, _state(entry), places))
        elif "param_groups" not in name and (name, ()) in places:
            _put(tree, path, _read(folder, name, places[name, ()], skip_objects=skip_objects))
    return tree


def _path(name: str, paths: object) -> tuple[Any, ...]:
    """The keys that led to an entry before it was saved, where the index has them."""
    found = cast("dict[Any, Any]", paths).get(name) if isinstance(paths, dict) else None
    if not isinstance(found, tuple):
        return (name,)
    keys = cast("tuple[Any, ...]", found)
    return keys if keys and all(type(key) in (str, int) for key in keys) else (name,)


def _put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  # a hostile index has any path
            raise FileFormatError("is damaged: something in its index has two places")
    tree[path[-1]] = value


def _read(folder: Path, name: str, place: tuple[str, int, int], *, skip_objects: bool) -> Any:
    file, start, length = place
    if Path(file).name != file or not (folder / file).is_file():
        raise FileFormatError(f"names the file {file[:80]!r} for {name[:80]!r}, which is not in it")
    return read_archive(folder / file, skip_objects=skip_objects, offset=start, num_bytes=length)


def _tensor(folder: Path, name: str, entry: dict[str, Any], places: _Places) -> Leaf:
    dtype = _dtype(_state(entry["properties"]))
    shape = tuple(entry["size"])
    pieces: list[tuple[tuple[int, ...], Stored]] = []
    covered = 0
    for chunk in entry["chunks"]:
        sizes = _state(chunk)
        offset, size = tuple(sizes["offsets"]), tuple(sizes["sizes"])
        if 0 in size and 0 not in shape:
            continue
        piece = _read(folder, name, places.get((name, offset)) or places[name, ()], skip_objects=False)
        if not isinstance(piece, Stored) or piece.shape != size or piece.dtype != dtype:
            raise FileFormatError(f"is damaged: a piece of {name[:80]!r} is not what the index says")
        if any(at < 0 or at + count > whole for at, count, whole in zip(offset, size, shape, strict=True)):
            raise FileFormatError(f"is damaged: a piece of {name[:80]!r} lies outside of it")
        covered += math.prod(size)
        pieces.append((offset, piece))
    pieces.sort(key=lambda piece: piece[0])
    for place, piece in enumerate(pieces):
        if any(_overlap(piece, other) for other in _while_beside(piece, islice(pieces, place + 1, None))):
            raise FileFormatError(f"is damaged: pieces of {name[:80]!r} overlap")
    if covered != math.prod(shape):
        raise FileFormatError(
            f"is damaged: the pieces of {name[:80]!r} have {covered:,} numbers of {math.prod(shape):,}"
        )
    return pieces[0][1] if len(pieces) == 1 else Pieced(dtype, shape, tuple(pieces))


_Piece = tuple[tuple[int, ...], Stored]


def _while_beside(piece: _Piece, others: Iterable[_Piece]) -> Iterator[_Piece]:
    """The pieces that begin before the end of this one in the first dimension; they are in order."""
    offset, stored = piece
    for other in others:
        if offset and other[0][0] >= offset[0] + stored.shape[0]:
            return
        yield other


def _overlap(one: _Piece, two: _Piece) -> bool:
    return all(
        begin < other + more and other < begin + count
        for begin, count, other, more in zip(one[0], one[1].shape, two[0], two[1].shape, strict=True)
    )


def _dtype(properties: Any) -> str:
    """That of the properties, which are kept as a row of values or by name."""
    found = cast("object", properties[0] if isinstance(properties, tuple) else properties["dtype"])
    if not isinstance(found, Name) or found.name not in DTYPES:
        raise FileFormatError("is damaged: a tensor of its index has no dtype")
    return found.name


def _state(record: object, of: str | None = None) -> Any:
    """What an object of the index holds: its fields by name, or the values that it was made of."""
    if not isinstance(record, Record) or (of is not None and not record.of.endswith(f".{of}")):
        if of is None and isinstance(record, (tuple, list)):
            return cast("Any", record)
        raise FileFormatError("is damaged: its index has another form")
    return record.state if record.state is not None else record.arguments


def _refuse(_: object) -> Any:
    raise FileFormatError("is damaged: its index refers to something outside of it")
