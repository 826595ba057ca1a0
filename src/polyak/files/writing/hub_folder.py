"""Folders in the layout of Hugging Face: one safetensors file, or several with an index of what is where."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from torch import Tensor

from .safetensors import num_file_bytes, write_tensors
from .whole import flush, new_folder


def write_sharded(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    max_bytes: int,
    stem: str = "model",
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Writes tensors by name to a new folder, whole or not at all, as `from_pretrained` reads them.

    Where everything fits, there is one file `model.safetensors`. Else there are `model-00001-of-00002.safetensors` and
    so on, filled in the order of the tensors, and `model.safetensors.index.json`. Each is as of `write_safetensors`.

    Args:
        folder: where to; it must not exist, or be empty.
        tensors: by name; a tensor with several names is written under each.
        metadata: of each file.
        max_bytes: that the tensors of one file have at most. A tensor that has more gets a file of its own.
        stem: how the names of the files begin: "model", or "diffusion_pytorch_model" for diffusers.
        beside: other files of the folder, by name, such as a configuration.

    Raises:
        FileExistsError: `folder` is a file, or a folder that is not empty.
        OSError: the folder cannot be written, and is not there.
        ValueError: the format has no such tensors, or `max_bytes` is not positive.
    """
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, not {max_bytes}")
    shards = _split(tensors, max_bytes=max_bytes)
    names = [_file_name(stem, number, of=len(shards)) for number in range(1, len(shards) + 1)]
    num_bytes = sum(num_file_bytes(shard, metadata=metadata) for shard in shards)
    with new_folder(folder, num_bytes=num_bytes) as temporary:
        for name, shard in zip(names, shards, strict=True):
            with (temporary / name).open("xb") as file:
                write_tensors(file, shard, metadata=metadata)
                flush(file)
        index = {f"{stem}.safetensors.index.json": _index(names, shards)} if len(shards) > 1 else {}
        for name, content in {**index, **(beside or {})}.items():
            with (temporary / name).open("xb") as file:
                file.write(content)
                flush(file)


def _split(tensors: Mapping[str, Tensor], *, max_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _file_name(stem: str, number: int, *, of: int) -> str:
    return f"{stem}-{number:05}-of-{of:05}.safetensors" if of > 1 else f"{stem}.safetensors"


def _index(names: list[str], shards: list[dict[str, Tensor]]) -> bytes:
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
