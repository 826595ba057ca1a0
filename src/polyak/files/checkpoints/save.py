"""Files of `torch.save` that hold tensors and plain containers: written durably, and checked when they are read."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyak.errors import FileFormatError
from polyak.files.containers import damaged, open_content, verify
from polyak.files.writing import replacing

# Exact types: to an unpickler that runs no code a subclass is another type.
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (dict, OrderedDict, list, tuple, set)
_TENSORS = (Tensor, nn.Parameter)
# The longest integers that take the short form in a pickle.
_MAX_BITS = 255 * 8 - 1
_KINDS = "tensors, dict, list, tuple, set, str, bytes, int, float, bool, None, torch.Size, torch.dtype and torch.device"


def save(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a dictionary of tensors and plain containers as `torch.save` does, whole or not at all.

    When it returns, the file has reached the disk. Whatever happens before, a power cut or `kill -9` included, leaves
    the file that was there as it was. `torch.load(path, weights_only=True)` reads it, and `polyak.load` does so with
    every checksum compared.

    Args:
        content: tensors, dict, list, tuple, set, str, bytes, int, float, bool, None, torch.Size, torch.dtype and
            torch.device, in any depth. Tensors that share memory share it again when they are read.
        path: the file. Its folder must exist and have room for the new file beside the old one.

    Raises:
        ValueError: the name is one for files of another kind, or there is no end to its containers.
        TypeError: something in it could be read only by running code; the message says where it stands. Nothing was
            written.
        OSError: the file cannot be written; one that was there is as it was. With `errno.ENOSPC` there is no room.

    Example:
        >>> import tempfile, torch, polyak
        >>> model = torch.nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     polyak.save({"model": model.state_dict(), "step": 7}, f"{folder}/last.pt")
        ...     polyak.load(f"{folder}/last.pt")["step"]
        7
        >>> polyak.save({"model": model}, "last.pt")
        Traceback (most recent call last):
        TypeError: content['model'] is a Linear; save its state_dict()
    """
    if not isinstance(content, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise TypeError(f"content is a {type(content).__name__}; save a dictionary, such as {{'content': ...}}")
    if os.fspath(path).endswith(".safetensors"):
        raise ValueError(f"{os.fspath(path)!r}: this is a file of torch.save; name it .pt, for others go by the name")
    size = _Size()
    try:
        size.add(content, "content")
    except RecursionError:
        raise ValueError("content has containers in containers, deeper than Python can save them") from None
    with replacing(path, num_bytes=size.num_bytes) as file, _with_checksums():
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch closes its archive after the failure, fails again at that, and says that only.
            raise _cause(error) from None


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a dictionary that `polyak.save` or `torch.save` wrote, on the CPU, after comparing every checksum in it.

    No code from the file is run. `torch.load` does not compare the checksums: a bit that flipped on the disk is then a
    wrong number in a tensor, silently.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is damaged (the message names the record, unless the file is cut off); or it was saved
            with torch's checksums switched off, is of another kind, or holds objects whose loading would run code.

    Example:
        >>> import tempfile, torch, polyak
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     polyak.save({"weight": torch.ones(2)}, f"{folder}/last.pt")
        ...     polyak.load(f"{folder}/last.pt")
        {'weight': tensor([1., 1.])}
    """
    verification = verify([Path(path)])
    if verification.problems:
        raise FileFormatError(f"{os.fspath(path)!r} is damaged: {verification.problems[0]}; take another copy of it")
    # Whatever could run code ends here, also in versions of torch that can be led to run it.
    if open_content(path).kind != "torch":
        raise FileFormatError(
            f"{os.fspath(path)!r} was not written by torch.save; polyak.read() reads the tensors in it"
        )
    if not verification.num_fitting:
        raise FileFormatError(
            f"{os.fspath(path)!r} was written without checksums, and may be damaged; torch.load() reads it unchecked"
        )
    try:
        # By the content, for torch goes by the name where it can.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} holds objects that torch does not load without running code; polyak.read() reads the "
            "averages in it"
        ) from error
    except OSError:
        raise
    # What nobody saved, but has its checksums, leads torch to any error.
    except Exception as error:
        raise damaged(path, error) from error


class _Size:
    """Looks through all of a content, and adds up the bytes that its tensors and texts will have in a file."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._seen: dict[int, object] = {}

    def add(self, value: object, place: str) -> None:
        """Adds a value that stands at a place.

        Raises:
            TypeError: it could not be read without running code.
        """
        kind = type(value)
        if kind not in _PLAIN and kind not in _CONTAINERS and kind not in _TENSORS:
            raise TypeError(f"{place} is a {kind.__name__}; {_advice(value)}")
        if kind is bytes and not value:
            raise TypeError(f"{place} is empty bytes, which torch.load(weights_only=True) cannot read; save None")
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise TypeError(
                f"{place} is an integer of {value.bit_length()} bits, which torch.load(weights_only=True) cannot read"
            )
        if isinstance(value, (str, bytes)):
            self.num_bytes += len(value)
        # What contains itself, or stands in several places, is saved once.
        if kind in _PLAIN or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._add_storage(value)
        elif isinstance(value, dict):
            for key, item in cast("dict[object, object]", value).items():
                self.add(key, f"the key {key!r} of {place}")
                self.add(item, f"{place}[{key!r}]")
        elif isinstance(value, set):
            for item in cast("set[object]", value):
                self.add(item, f"an element of {place}")
        else:
            for position, item in enumerate(cast("list[object]", value)):
                self.add(item, f"{place}[{position}]")
        # Python attributes are saved with tensors and ordered dictionaries: `_metadata` of a state_dict, say.
        for name, item in getattr(cast("object", value), "__dict__", {}).items():
            self.add(item, f"{place}.{name}")

    def _add_storage(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.num_bytes += storage.nbytes()


def _advice(value: object) -> str:
    if isinstance(value, Tensor):
        return "save a plain torch.Tensor of it"
    if hasattr(value, "state_dict"):
        return "save its state_dict()"
    if hasattr(value, "tolist"):
        return "save its tolist(), or a tensor of it"
    return f"without running code only {_KINDS} can be read again"


def _cause(error: BaseException) -> BaseException:
    """The OSError that came before an error, if there was one, else the error."""
    found = error.__context__
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return error if found is None else found


@contextmanager
def _with_checksums() -> Generator[None, None, None]:
    """torch.save writes checksums, also where somebody has switched them off for other files."""
    # torch 2.5 always writes them.
    getter, setter = (getattr(torch.serialization, f"{verb}_crc32_options", None) for verb in ("get", "set"))
    if getter is None or setter is None:
        yield
        return
    before = getter()
    setter(True)
    try:
        yield
    finally:
        setter(before)
