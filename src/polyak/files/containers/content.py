"""Opens a file or folder of any kind as a tree, without reading its tensors or running what it holds."""

from __future__ import annotations

import json
import os
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from polyak.errors import FileFormatError
from polyak.files.dtypes import BY_SAFETENSORS

from .archive import is_archive, is_legacy, read_archive, read_legacy
from .distributed import INDEX, read_distributed
from .stored import Content, Record, Span, Stored, dense_stride, stored

# In the order in which the libraries themselves look for them.
STEMS = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin")
CONFIGURATION = "config.json"
_MAX_JSON = 1 << 25
_MAX_HEADER = 100_000_000
_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")
# In what is known about a folder: files beside the weights in which accelerate keeps what it was given.
STATES = "<states>"
_STATES_PATTERN = "custom_checkpoint_*.pkl"


def weights_file(folder: Path) -> Path | None:
    """The file of a folder that has the weights, or the index of such files; of variants, the only one.

    Raises:
        FileFormatError: there are several variants, and none without a name.
    """
    for stem in STEMS:
        for suffix in SUFFIXES:
            for name in (f"{stem}{suffix}", f"{stem}{suffix}.index.json"):
                if (folder / name).is_file():
                    return folder / name
    for stem in STEMS:
        for suffix in SUFFIXES:
            variants = {
                *folder.glob(f"{stem}{suffix}.index.*.json"),
                *(one for one in folder.glob(f"{stem}.*{suffix}") if one.name.count(".") == 2),
            }
            if len(variants) > 1:
                raise FileFormatError(
                    f"has several variants, {', '.join(sorted(one.name for one in variants))}: give one of these files"
                )
            if variants:
                return variants.pop()
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A dictionary that a file of JSON holds.

    Raises:
        FileFormatError: it holds none.
    """
    if path.stat().st_size > _MAX_JSON:
        raise FileFormatError(f"has {path.stat().st_size:,} bytes, which no model needs")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileFormatError("is no JSON") from error
    if not isinstance(content, dict):
        raise FileFormatError("holds no dictionary")
    return cast("dict[str, Any]", content)


def read_json_inside(path: Path) -> dict[str, Any]:
    """The same of a file in the folder that is read, whose name stands before what is wrong."""
    try:
        return read_json(path)
    except FileFormatError as error:
        raise error.inside(f"has {path.name!r}, which") from error.__cause__


def read_indexed(index: Path, read_file: Callable[[Path], dict[Any, Any]]) -> dict[Any, Any]:
    """The tensors of all files that an index names, after each was found where the index says that it is."""
    places = read_json_inside(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FileFormatError(f"has the index {index.name!r} without a weight_map")
    given = cast("dict[str, Any]", places)
    tensors: dict[Any, Any] = {}
    for name in dict.fromkeys(map(str, given.values())):
        if Path(name).name != name or name in (".", ".."):
            raise FileFormatError(f"has the index {index.name!r}, which leads out of its folder: {name[:80]!r}")
        if not (index.parent / name).is_file():
            raise FileFormatError(f"lacks {name[:80]!r}, which {index.name!r} names")
        found = read_file(index.parent / name)
        wanted = [key for key, file in given.items() if file == name]
        lacking = [key for key in wanted if key not in found]
        if lacking:
            raise FileFormatError(f"lacks {lacking[0][:80]!r} in {name!r}, where {index.name!r} says that it is")
        tensors |= {key: found[key] for key in wanted}
    return tensors


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins so has a header of JSON behind its length."""
    return len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= _MAX_HEADER


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file, and its metadata."""
    # It comes from the library's own core, and does not need torch.
    from safetensors import safe_open  # pyright: ignore[reportUnknownVariableType]  # its parts have no types

    with cast("Any", safe_open)(path, framework="numpy") as checked:
        names: set[str] = set(checked.keys())
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    metadata: dict[str, str] = header.pop("__metadata__", None) or {}
    assert header.keys() == names
    tensors: dict[str, Stored] = {}
    for place, (name, entry) in enumerate(header.items()):
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if entry["dtype"] not in BY_SAFETENSORS:
            raise FileFormatError(f"has the tensor {name[:80]!r} of dtype {entry['dtype']}, which is not read")
        span = Span(path, 8 + length + begin, end - begin)
        # Nothing is tied in this format; empty tensors, which lie in one place, are told apart by where they begin.
        start = 0 if end > begin else place
        tensors[name] = stored(BY_SAFETENSORS[entry["dtype"]].name, shape, dense_stride(shape), start, span)
    return dict(sorted(tensors.items(), key=lambda item: item[1].span.offset)), metadata


def open_content(path: str | os.PathLike[str], *, skip_objects: bool = False) -> Content:
    """What is in a file or folder.

    Args:
        path: a file of torch.save or safetensors, an index of such files, a folder of Hugging Face's form, or one of
            torch.distributed.checkpoint.
        skip_objects: whether objects of unknown classes are passed over, without importing them, instead of refused.

    Raises:
        FileNotFoundError: there is nothing of that name.
        FileFormatError: it is damaged or hostile, or nothing of these.
    """
    target = Path(path)
    try:
        return _open(target, skip_objects)
    except FileFormatError as error:
        raise error.inside(repr(os.fspath(path))) from error.__cause__
    except OSError as error:
        # What a damaged file leads zipfile to has no number; what the system says has one.
        if error.errno is not None and error.filename is not None:
            raise
        raise damaged(path, error) from error
    # A damaged byte leads to any error: of zipfile, of the pickle's machine, of a table that has no such key.
    except Exception as error:
        raise damaged(path, error) from error


def damaged(path: str | os.PathLike[str], error: Exception) -> FileFormatError:
    """What a user is told of a file whose bytes led to an error that nobody foresaw."""
    about = str(error)[:200]
    return FileFormatError(f"{os.fspath(path)!r} is damaged, and cannot be read: {type(error).__name__}: {about}")


def _open(path: Path, skip_objects: bool) -> Content:
    if path.is_dir():
        return _open_folder(path, skip_objects)
    if _INDEX.fullmatch(path.name):
        tensors = read_indexed(path, lambda file: _read(file, skip_objects)[0])
        return Content(path, "folder", tensors, _configuration(path.parent), _size(path.parent))
    if path.exists() and not path.is_file():
        raise FileFormatError("is neither a file nor a folder")
    tree, about, kind = _read(path, skip_objects)
    return Content(path, kind, tree, about, path.stat().st_size)


def _open_folder(folder: Path, skip_objects: bool) -> Content:
    if (folder / INDEX).is_file():
        return Content(folder, "distributed", read_distributed(folder, skip_objects=skip_objects), {}, _size(folder))
    file = weights_file(folder)
    if file is None:
        inside = sorted(entry.name for entry in folder.iterdir())
        raise FileFormatError(
            "is a folder without weights: neither of torch.distributed.checkpoint nor of Hugging Face's form. In it: "
            f"{', '.join(inside[:8]) or 'nothing'}"
        )
    tensors = _open(file, skip_objects).tree
    about = _configuration(folder)
    states = sorted(state.name for state in folder.glob(_STATES_PATTERN))
    if states:
        about = {**about, STATES: states}
    return Content(folder, "folder", tensors, about, _size(folder))


def _configuration(folder: Path) -> dict[str, Any]:
    return read_json_inside(folder / CONFIGURATION) if (folder / CONFIGURATION).is_file() else {}


def _size(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())


def _read(path: Path, skip_objects: bool) -> tuple[dict[Any, Any], dict[str, Any], str]:
    with path.open("rb") as file:
        start = file.read(64)
    if is_safetensors(start):
        tensors, metadata = read_safetensors(path)
        return dict(tensors), dict(metadata), "safetensors"
    if is_archive(start):
        content = read_archive(path, skip_objects=skip_objects)
    elif is_legacy(start):
        content = read_legacy(path, skip_objects=skip_objects)
    elif not start:
        raise FileFormatError("is empty")
    elif start.startswith(b"\x80"):
        raise FileFormatError(
            "is a pickle, and none of torch.save: loading it could run code, and it is not read. Load it with what "
            "wrote it, if you trust that, and write the tensors by torch.save"
        )
    elif tarfile.is_tarfile(path):
        raise FileFormatError("is a tar archive; unpack it, and give the file or folder in it")
    else:
        raise FileFormatError("is neither a file of torch.save nor one of safetensors")
    if not isinstance(content, dict):
        kind = "a tensor" if isinstance(content, Stored) else f"a {type(content).__name__}"
        kind = f"the object {content.of}" if isinstance(content, Record) else kind
        raise FileFormatError(f"holds {kind}, not a dictionary of tensors: save a state_dict()")
    return cast("dict[Any, Any]", content), {}, "torch"
