"""Writes files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from polyak.errors import listed


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]
) -> None:
    """Writes tensors by name to a safetensors file; a tensor with several names is written under each.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    # Imported here, so that `import polyak` loads torch alone.
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]  # PathLike of what, it says not

    unknown = [name for name, tensor in tensors.items() if tensor.dtype == torch.complex128]
    if unknown:
        raise ValueError(f"the safetensors format has no complex128, the dtype of {listed(unknown)}; use state_dict()")
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # The format has no shared memory; whoever loads the file ties tensors again.
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.contiguous().clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    with replacing(path) as temporary:
        save_file(separate, temporary, metadata={"format": "pt", **metadata})


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """A temporary file beside `path` to write to; at the end it is flushed to the disk and takes the place of `path`.

    If anything fails before that, the temporary file is gone and `path` is as it was.
    """
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)!r} cannot be written: there is no folder {str(target.parent)!r}")
    if target.is_dir():
        raise IsADirectoryError(
            f"{os.fspath(path)!r} cannot be written: it is a folder, and the name of a file is needed"
        )
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _flush(target.parent)


def _flush(path: Path) -> None:
    # A directory holds the names: without flushing it the rename may be lost, and Windows cannot.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
