"""Writes the safetensors format, tensor by tensor, with the checksum of each."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import BinaryIO, cast

import torch
from torch import Tensor

from polyak.errors import listed
from polyak.files.containers import CHECKSUM_DIGITS, CHECKSUMS
from polyak.files.dtypes import BY_SAFETENSORS

from .whole import replacing

# Older versions of torch lack some of them.
_DTYPES = {getattr(torch, one.name): code for code, one in BY_SAFETENSORS.items() if hasattr(torch, one.name)}
_CHUNK = 1 << 24


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    give: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes tensors by name to a safetensors file; a tensor with several names is written under each.

    The metadata gets `polyak.checksums`: JSON of the first 16 hexadecimal digits of the SHA-256 of each tensor's bytes
    in the file, by its name. One tensor at a time is copied, where it is on another device or not contiguous.

    Args:
        path: the file.
        tensors: by name.
        metadata: of the file.
        give: gives a tensor by its name, in the order of `in_file_order`, each once, where `tensors` says only of which
            dtypes and shapes they are.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
        ValueError: the format has no such tensors.
    """
    with replacing(path, num_bytes=num_file_bytes(tensors, metadata=metadata)) as file:
        write_tensors(file, tensors, metadata=metadata, give=give)


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    give: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes what a safetensors file consists of to a file that is open."""
    # The header stands first and holds the checksums, so it is written a second time, with the same length.
    checksums = dict.fromkeys(tensors, "0" * CHECKSUM_DIGITS)
    file.write(_header(tensors, metadata=metadata, checksums=checksums))
    for name in in_file_order(tensors):
        content = _content(tensors[name] if give is None else give(name))
        digest = hashlib.sha256()
        # By chunks, so that a tensor that somebody changes meanwhile is written as it was when it was summed.
        for start in range(0, len(content), _CHUNK):
            chunk = content[start : start + _CHUNK]
            digest.update(chunk)
            file.write(chunk)
        checksums[name] = digest.hexdigest()[:CHECKSUM_DIGITS]
    file.seek(0)
    file.write(_header(tensors, metadata=metadata, checksums=checksums))


def num_file_bytes(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> int:
    """The bytes that a safetensors file of these tensors has.

    Raises:
        ValueError: the format has no such tensors.
    """
    unknown = [name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES]
    if unknown:
        dtype = str(tensors[unknown[0]].dtype).removeprefix("torch.")
        raise ValueError(f"the safetensors format has no {dtype}, the dtype of {listed(unknown)}; use state_dict()")
    sparse = [name for name, tensor in tensors.items() if tensor.layout != torch.strided]
    if sparse:
        raise ValueError(f"the safetensors format has no sparse tensors, such as {listed(sparse)}; use to_dense()")
    header = _header(tensors, metadata=metadata, checksums=dict.fromkeys(tensors, "0" * CHECKSUM_DIGITS))
    return len(header) + sum(tensor.nbytes for tensor in tensors.values())


def _header(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str], checksums: Mapping[str, str]) -> bytes:
    """Its length in 8 bytes, then JSON, filled with spaces so that the tensors begin at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata, CHECKSUMS: json.dumps(checksums)}}
    end = 0
    for name in in_file_order(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names, large elements first, so that each begins at a multiple of its own size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _content(tensor: Tensor) -> memoryview:
    """A tensor's bytes as the format has them: contiguous, the lowest first."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if sys.byteorder == "big":
        plain = plain.clone()
        plain.untyped_storage().byteswap(plain.dtype)  # pyright: ignore[reportUnknownMemberType]  # it has no types
    return memoryview(cast("bytes", plain.reshape(-1).view(torch.uint8).numpy()))
