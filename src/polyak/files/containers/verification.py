"""Whether the bytes of files are those that were written: by the checksums that are kept in them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from .archive import Window, is_archive, is_legacy
from .content import is_safetensors, open_content
from .reader import Reader
from .stored import Stored

# In the metadata of a safetensors file: the first digits of the SHA-256 of each tensor's bytes, by name.
CHECKSUMS = "polyak.checksums"
CHECKSUM_DIGITS = 16
_CHUNK = 1 << 16
_START = 64
# An attribute of MS-DOS. Memory that torch.load reads nothing into has whatever was there.
_IS_FOLDER = 0x10
_NONE = "it is cut off, its list of records is wrong, or torch.save did not write it"
# Each of these yields the bytes of every record that fits, a problem for every other one, and notes.
_Results = Iterator["int | Problem | str"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A record or tensor whose bytes are not those that were written; no record where the whole file is wrong."""

    file: str
    record: str
    problem: str

    def __str__(self) -> str:
        return f"the record {self.record!r}: {self.problem}" if self.record else self.problem


@dataclass(frozen=True, slots=True)
class Verification:
    """What the checksums in the files say.

    Attributes:
        num_fitting: records and tensors whose bytes fit their checksums.
        num_bytes: of these.
        problems: those whose bytes do not, and what else is wrong.
        notes: what could not be checked.
    """

    num_fitting: int
    num_bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


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
            start = file.read(_START)
        if is_archive(start):
            results = _archive(path, tell)
        elif is_safetensors(start):
            results = _safetensors(path, tell)
        elif is_legacy(start):
            results = iter([f"{path.name!r} has no checksums"])
        else:
            results = iter([Problem(path.name, "", f"{_NONE} (it does not begin as such a file)")])
        for result in results:
            if isinstance(result, str):
                notes.append(result)
            elif isinstance(result, Problem):
                problems.append(result)
            else:
                num_fitting += 1
                num_bytes += result
    return Verification(num_fitting, num_bytes, tuple(problems), tuple(notes))


def _archive(path: Path, tell: Callable[[int], None]) -> _Results:
    """A file of torch.distributed.checkpoint is several archives, one after the other: the last one is found first."""
    several = path.suffix == ".distcp"
    with path.open("rb") as file:
        end, last = path.stat().st_size, math.inf
        while 0 < end < last and (several or last == math.inf):
            try:
                archive = zipfile.ZipFile(cast("BinaryIO", Window(file, 0, end)))
                records = archive.infolist()
            # zipfile raises whatever a damaged byte leads it to, here and below.
            except Exception as error:
                _raise_if_of_system(error)
                yield Problem(path.name, f"before byte {end:,}" if several else "", f"{_NONE} ({str(error)[:200]})")
                return
            # Each byte is read once, then.
            if sum(record.file_size for record in records) > end:
                yield Problem(path.name, "", "its records overlap, which torch.save never writes")
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
        if record.external_attr & _IS_FOLDER:
            yield Problem(path.name, record.filename, "is marked as a folder, of which torch.load reads nothing")
            continue
        try:
            with archive.open(record) as stream:
                while data := stream.read(_CHUNK):
                    tell(len(data))
            yield record.file_size
        except Exception as error:
            _raise_if_of_system(error)
            differs = str(error).startswith("Bad CRC-32")
            yield Problem(path.name, record.filename, "its bytes do not fit its CRC32" if differs else str(error)[:200])


def _raise_if_of_system(error: Exception) -> None:
    """Passes on what the system says: zipfile itself raises whatever a damaged byte leads it to, at a seek too."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error


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
    with Reader(in_order=True) as reader:
        for name, stored in content.tree.items():
            if name in known and isinstance(stored, Stored):
                fits = _digest(reader, stored, tell) == known[name]
                yield stored.num_bytes if fits else Problem(path.name, name, "its bytes do not fit its SHA-256")


def _digest(reader: Reader, stored: Stored, tell: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    for data in reader.stretches(stored, _CHUNK):
        digest.update(data)
        tell(len(data))
    return digest.hexdigest()[:CHECKSUM_DIGITS]


def _nothing(_: int) -> None:
    pass
