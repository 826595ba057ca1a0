"""Temporary files and folders beside what they are to replace, and the removal of those whose writer was killed."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

_TOKEN_BYTES = 8
_ENDING = ".tmp"


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
