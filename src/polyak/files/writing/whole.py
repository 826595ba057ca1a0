"""Files and folders that are there whole or not at all, whatever happens to the writer, the disk or the power."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

_TOKEN_BYTES = 8
_ENDING = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_FLUSHED_THERE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))


@contextmanager
def temporary_file(target: Path, *, mode: int) -> Generator[BinaryIO, None, None]:
    """An empty file in the folder of `target`, open for writing; at the end it is removed if it is still there.

    Its writer holds a lock on it, which the kernel gives back when the writer dies, however it dies. So whoever gets
    the lock of another's temporary file knows that it is a leftover.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    while True:
        path = _new_name(target)
        try:
            file = open(path, "xb", opener=opener)  # noqa: SIM115  # closing it can fail, and then hides what failed
            try:
                _lock(file.fileno(), wait=True)
                # Another writer may have taken it for a leftover before it was locked.
                if path.exists():
                    yield file
                    return
            finally:
                with suppress(OSError):
                    file.close()
        finally:
            with suppress(OSError):
                path.unlink()


@contextmanager
def temporary_folder(target: Path) -> Generator[Path, None, None]:
    """An empty folder beside `target`, locked like a temporary file; at the end it is removed if it is still there."""
    while True:
        path = _new_name(target)
        try:
            path.mkdir()
            descriptor = _open_folder(path)
            try:
                if descriptor is not None:
                    _lock(descriptor, wait=True)
                if path.exists():
                    yield path
                    return
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Removes what killed writers of `target` left behind; what is being written stays.

    Where files cannot be locked, on Windows and on some network file systems, leftovers stay.
    """
    # No save fails because there is something that cannot be tidied up.
    with suppress(OSError):
        prefix = _prefix(target)
        for entry in os.scandir(target.parent):
            if entry.name.startswith(prefix) and entry.name.endswith(_ENDING):
                with suppress(OSError):
                    _remove_if_dead(Path(entry.path), is_folder=entry.is_dir(follow_symlinks=False))


def _remove_if_dead(path: Path, *, is_folder: bool) -> None:
    if sys.platform == "win32" or not (is_folder or path.is_file()):
        return
    # NFS gives a lock for a file that is open for writing only, and a folder cannot be.
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        if not _lock(descriptor, wait=False):
            return
        if is_folder:
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock was acquired; always False if locking is not supported."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _open_folder(path: Path) -> int | None:
    """A folder that another writer removed before it was locked has no descriptor; nor has any on Windows."""
    if sys.platform == "win32":
        return None
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def _new_name(target: Path) -> Path:
    return target.parent / f"{_prefix(target)}{secrets.token_hex(_TOKEN_BYTES)}{_ENDING}"


def _prefix(target: Path) -> str:
    """How the temporary names of a target begin; long names are cut to fit, and may then share theirs with others."""
    longest = os.pathconf(target.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    room = longest - len(f"..polyak-{_ENDING}") - 2 * _TOKEN_BYTES
    name = os.fsencode(target.name)[:room].decode(errors="ignore")
    return f".{name}.polyak-"


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
