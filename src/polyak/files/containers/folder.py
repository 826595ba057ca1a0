"""Folders of weights in the form of Hugging Face: one file, or several with an index, and a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from polyak.errors import FileFormatError

# In the order in which the libraries themselves look for them.
STEMS = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin")
CONFIGURATION = "config.json"
_MAX_JSON = 1 << 25


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
