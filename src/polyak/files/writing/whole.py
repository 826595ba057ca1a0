"""Files and folders that are there whole or not at all, whatever happens to the writer, the disk or the power."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .temporary import remove_leftovers, temporary_file, temporary_folder

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_FLUSHED_THERE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))


@contextmanager
def replacing(path: str | os.PathLike[str], *, num_bytes: int = 0) -> Generator[BinaryIO, None, None]:
    """A temporary file beside `path` to write to; at the end it is flushed to the disk and takes the place of `path`.

    Whatever fails before that, a power cut or `kill -9` included, leaves `path` as it was. Of two that write at once
    the later one's file stays, whole. A link is kept, and what it points to is replaced; a file that was there keeps
    its mode, and its owner where that is allowed. What killed writers of the same path left behind is removed.

    Args:
        path: the file.
        num_bytes: how many bytes it will have at least. Where fewer are free, nothing is begun.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: `path` is a folder.
        PermissionError: the folder or the file is read-only.
        OSError: it cannot be written for another reason. With `errno.ENOSPC` there is no room.
    """
    target = _behind_links(path)
    before = _check_target(path, target)
    remove_leftovers(target)
    check_space(path, target.parent, num_bytes)
    written = 0
    try:
        with temporary_file(target, mode=0o666 if before is None else 0o600) as file:
            if before is not None:
                _take_over(file.name, before)
            try:
                yield file
                flush(file)
            finally:
                written = os.fstat(file.fileno()).st_size
            if os.name == "nt":
                file.close()
            os.replace(file.name, target)
    except OSError as error:
        raise _explained(error, path, target.parent, num_bytes=num_bytes, written=written) from error
    flush_folder(target.parent)


@contextmanager
def new_folder(path: str | os.PathLike[str], *, num_bytes: int = 0) -> Generator[Path, None, None]:
    """A temporary folder beside `path` to write files to, and to `flush`; at the end it takes the name of `path`.

    Whatever fails before that leaves nothing. A folder that is there must be empty, for two folders cannot be
    exchanged in one step on every system.

    Args:
        path: the folder.
        num_bytes: how many bytes its files will have at least. Where fewer are free, nothing is begun.

    Raises:
        FileExistsError: `path` is a file, or a folder that is not empty.
        FileNotFoundError: there is no folder to make it in.
        OSError: it cannot be written for another reason. With `errno.ENOSPC` there is no room.
    """
    target = _behind_links(path)
    _check_parent(path, target)
    _check_is_free(path, target)
    remove_leftovers(target)
    check_space(path, target.parent, num_bytes)
    written = 0
    try:
        with temporary_folder(target) as folder:
            try:
                yield folder
            finally:
                written = sum(entry.stat().st_size for entry in os.scandir(folder))
            if target.is_dir():
                folder.chmod(stat.S_IMODE(target.stat().st_mode))
                if os.name == "nt":
                    target.rmdir()
            flush_folder(folder)
            folder.rename(target)
    except OSError as error:
        _check_is_free(path, target)
        raise _explained(error, path, target.parent, num_bytes=num_bytes, written=written) from error
    flush_folder(target.parent)


def check_space(path: str | os.PathLike[str], folder: Path, num_bytes: int) -> None:
    """Raises if a folder has room for fewer bytes, before any is written."""
    usage = shutil.disk_usage(folder)
    # Some file systems do not tell, and give zero for everything.
    if usage.total and usage.free < num_bytes:
        raise _full(path, folder, num_bytes=num_bytes, free=usage.free)


def flush(file: BinaryIO) -> None:
    """Returns when all that was written to a file has reached the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Returns when the names in a folder have reached the disk; without it a rename may be lost with the power."""
    if os.name == "nt":  # Windows has no such call.
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FLUSHED_THERE:
            raise


def _behind_links(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))
    if os.path.islink(target):
        raise OSError(errno.ELOOP, f"{os.fspath(path)!r} cannot be written: it is a link that leads to itself")
    return target


def _check_parent(path: str | os.PathLike[str], target: Path) -> None:
    if not os.path.isdir(target.parent):
        raise FileNotFoundError(f"{os.fspath(path)!r} cannot be written: there is no folder {str(target.parent)!r}")


def _names_a_folder(path: str | os.PathLike[str]) -> IsADirectoryError:
    return IsADirectoryError(f"{os.fspath(path)!r} cannot be written: it is a folder, and the name of a file is needed")


def _check_target(path: str | os.PathLike[str], target: Path) -> os.stat_result | None:
    """What is known of the file that will be replaced, or None where there is none."""
    if os.fsdecode(path).endswith(_SEPARATORS):
        raise _names_a_folder(path)
    _check_parent(path, target)
    try:
        before = target.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(error.errno, f"{os.fspath(path)!r} cannot be written: {error.strerror}") from error
    if stat.S_ISDIR(before.st_mode):
        raise _names_a_folder(path)
    if not stat.S_ISREG(before.st_mode):
        raise OSError(errno.EINVAL, f"{os.fspath(path)!r} cannot be written: it is a device or a pipe, not a file")
    if not os.access(target, os.W_OK):
        raise PermissionError(
            errno.EACCES, f"{os.fspath(path)!r} cannot be written: it is read-only; choose another name, or chmod +w"
        )
    return before


def _check_is_free(path: str | os.PathLike[str], target: Path) -> None:
    if target.is_dir():
        count = len(os.listdir(target))
        if not count:
            return
        there = f"there is a folder with {count} {'entry' if count == 1 else 'entries'}"
    elif target.exists():
        there = "there is a file"
    else:
        return
    raise FileExistsError(
        errno.EEXIST, f"{os.fspath(path)!r} cannot be written: {there}; choose another name, or remove it first"
    )


def _take_over(name: str, before: os.stat_result) -> None:
    """Gives a file the owner, where that is allowed, and the mode of another."""
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(name, before.st_uid, before.st_gid)
    os.chmod(name, before.st_mode & 0o777)


def _explained(error: OSError, path: str | os.PathLike[str], folder: Path, *, num_bytes: int, written: int) -> OSError:
    if error.errno in _FULL:
        # What could be written tells what was free, under a quota, too.
        free = min(written, shutil.disk_usage(folder).free)
        return _full(path, folder, num_bytes=max(num_bytes, written + 1), free=free)
    reason = error.strerror if error.strerror else str(error)
    return OSError(error.errno or errno.EIO, f"{os.fspath(path)!r} cannot be written, and is as it was: {reason}")


def _full(path: str | os.PathLike[str], folder: Path, *, num_bytes: int, free: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"{os.fspath(path)!r} cannot be written, and is as it was: it needs {num_bytes:,} bytes, and {free:,} are free "
        f"in {str(folder)!r}; make room for {num_bytes - free:,} more",
    )
