"""Opens a file or folder of any kind as a tree, without reading its tensors or running what it holds."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from typing import Any, cast

from polyak.errors import FileFormatError

from .archive import is_archive, is_legacy, read_archive, read_legacy
from .distributed import INDEX, read_distributed
from .folder import CONFIGURATION, read_indexed, read_json_inside, weights_file
from .safetensors_header import is_safetensors, read_safetensors
from .stored import Content, Record, Stored

_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")
# In what is known about a folder: files beside the weights in which accelerate keeps what it was given.
STATES = "<states>"
_STATES = "custom_checkpoint_*.pkl"


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
    states = sorted(state.name for state in folder.glob(_STATES))
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
