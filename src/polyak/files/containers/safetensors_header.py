"""Files of safetensors: the library checks them, and the header says where the bytes are."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, cast

from polyak.errors import FileFormatError
from polyak.files.dtypes import BY_SAFETENSORS

from .stored import Span, Stored, dense_stride, stored

_MAX_HEADER = 100_000_000


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
