"""Whether the bytes of files are those that were written: by the checksums that are kept in them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from polyak.containers import Stored, open_content

from .account import Problem, Verification

CHECKSUMS = "polyak.checksums"
_CHUNK = 1 << 16
_DIGITS = 16


def verify(paths: Iterable[Path], *, progress: Callable[[int], None] | None = None) -> Verification:
    """Reads files whole and compares their bytes with the checksums in them.

    Of an archive of torch.save each record has one, which `torch.load` does not look at. A safetensors file has those
    that polyak put there when it wrote the file.

    Args:
        paths: the files.
        progress: told how many bytes more were read.
    """
    tell = progress if progress is not None else _nothing
    num_fitting = num_bytes = 0
    problems: list[Problem] = []
    notes: list[str] = []
    for path in paths:
        with path.open("rb") as file:
            start = file.read(9)
        if start[:4] == b"PK\x03\x04":
            results = _archive(path, tell)
        elif start[8:] == b"{":
            results = _safetensors(path, tell)
        else:
            results = iter([f"{path.name!r} has no checksums"])
        for result in results:
            if isinstance(result, str):
                notes.append(result)
            elif isinstance(result, Problem):
                problems.append(result)
            else:
                num_fitting += 1
                num_bytes += result
    return Verification(num_fitting, num_bytes, tuple(problems), tuple(notes))


# Each of these yields the bytes of every record that fits, a problem for every other one, and notes.
_Results = Iterator["int | Problem | str"]


def _archive(path: Path, tell: Callable[[int], None]) -> _Results:
    """A file of torch.distributed.checkpoint is several archives, one after the other: the last one is found first."""
    several = path.suffix == ".distcp"
    with path.open("rb") as file:
        end, last = path.stat().st_size, math.inf
        while 0 < end < last and (several or last == math.inf):
            window = cast("BinaryIO", io.BufferedReader(_Window(file, end), _CHUNK))
            try:
                archive = zipfile.ZipFile(window)
                records = archive.infolist()
            except zipfile.BadZipFile as error:
                yield Problem(path.name, f"before byte {end:,}", f"is no archive: {error}")
                return
            last, end = end, min((record.header_offset for record in records), default=0)
            if any(record.CRC for record in records) or not any(record.file_size for record in records):
                yield from _records(path, archive, records, tell)
            else:
                yield f"{path.name!r} was written without checksums"


def _records(
    path: Path, archive: zipfile.ZipFile, records: Iterable[zipfile.ZipInfo], tell: Callable[[int], None]
) -> _Results:
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            yield Problem(path.name, record.filename, "is compressed, which torch.save never does")
            continue
        try:
            with archive.open(record) as stream:
                while data := stream.read(_CHUNK):
                    tell(len(data))
            yield record.file_size
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            differs = str(error).startswith("Bad CRC-32")
            yield Problem(path.name, record.filename, "its bytes do not fit its CRC32" if differs else str(error)[:200])


def _safetensors(path: Path, tell: Callable[[int], None]) -> _Results:
    content = open_content(path)
    if CHECKSUMS not in content.about:
        yield f"{path.name!r} has no checksums: of safetensors files only those that polyak wrote have them"
        return
    try:
        checksums: Any = json.loads(content.about[CHECKSUMS])
    except (ValueError, RecursionError):
        checksums = None
    if not isinstance(checksums, dict):
        yield Problem(path.name, CHECKSUMS, "is no JSON of a dictionary")
        return
    known = cast("dict[str, Any]", checksums)
    for name in known.keys() - content.tree.keys():
        yield Problem(path.name, name, "has a checksum, and is not in the file")
    lacking = [name for name in content.tree if name not in known]
    if lacking:
        yield f"{path.name!r} has no checksums of {len(lacking)} tensors"
    with path.open("rb", buffering=0) as file:
        for name, stored in content.tree.items():
            if name in known and isinstance(stored, Stored):
                fits = _digest(file, stored, tell) == known[name]
                yield stored.num_bytes if fits else Problem(path.name, name, "its bytes do not fit its SHA-256")


def _digest(file: io.FileIO, stored: Stored, tell: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    file.seek(stored.span.offset)
    left = stored.span.num_bytes
    while left and (data := file.read(min(left, _CHUNK))):
        digest.update(data)
        tell(len(data))
        left -= len(data)
    return digest.hexdigest()[:_DIGITS]


def _nothing(_: int) -> None:
    pass


class _Window(io.RawIOBase):
    """The beginning of a file as a file of its own."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self._num_bytes = num_bytes
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._num_bytes}[whence]
        if place < 0:
            raise OSError("a place before the beginning")
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._place)
        data = self._file.read(max(min(len(buffer), self._num_bytes - self._place), 0))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
