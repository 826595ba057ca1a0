"""Files of `torch.save`: a zip archive of one pickle and the bytes of each storage; before 1.6, a row of pickles."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from polyak.errors import FileFormatError
from polyak.files.dtypes import DTYPES

from .objects import StorageOf, find, storage
from .pickled import unpickle
from .stored import Span

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
MAX_PICKLE = 1 << 29


def is_archive(start: bytes) -> bool:
    """Whether a file that begins so is a zip archive."""
    return start.startswith(b"PK\x03\x04")


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins so was written by `torch.save` before 1.6."""
    return start.startswith(_LEGACY_START)


def read_archive(path: Path, *, skip_objects: bool, offset: int = 0, num_bytes: int | None = None) -> Any:
    """The content of a zip archive of `torch.save`, which may be a stretch of a larger file."""
    with path.open("rb") as file:
        window = cast("BinaryIO", file if num_bytes is None else Window(file, offset, num_bytes))
        archive = zipfile.ZipFile(window)
        spans = _records(path, file, archive, offset=offset)
        roots = {name.partition("/")[0] for name in spans}
        root = next(iter(roots)) if len(roots) == 1 else ""
        if f"{root}/constants.pkl" in spans and f"{root}/data.pkl" in spans:
            raise FileFormatError("is a TorchScript program, which is code; save the state_dict() of its module")
        if f"{root}/data.pkl" not in spans:
            raise FileFormatError("is a zip archive, and none of torch.save: it has no data.pkl")
        if f"{root}/byteorder" in spans and _bytes(file, spans[f"{root}/byteorder"]) != b"little":
            raise FileFormatError("was written on a big-endian machine, and is not read on this one")

        def persistent(given: Any) -> StorageOf:
            what, kind, key, *_ = given
            if what != "storage" or f"{root}/data/{key}" not in spans:
                raise FileFormatError(f"has no storage {str(key)[:40]!r}, which a tensor in it needs")
            return storage(kind, spans[f"{root}/data/{key}"])

        pickled = _bytes(file, spans[f"{root}/data.pkl"])
        # torch.save writes 0 where it was told to compute no checksums.
        if archive.getinfo(f"{root}/data.pkl").CRC not in (0, zlib.crc32(pickled)):
            raise FileFormatError("is damaged: its data.pkl is not what was written, by its checksum")
        return unpickle(
            io.BytesIO(pickled), find=lambda name: find(name, skip_objects=skip_objects), persistent=persistent
        )


def _records(path: Path, file: BinaryIO, archive: zipfile.ZipFile, *, offset: int) -> dict[str, Span]:
    """Where each record of an archive lies, after it is known that they are plain bytes apart from each other."""
    spans: dict[str, Span] = {}
    for record in archive.infolist():
        if record.filename in spans:
            raise FileFormatError(f"has two records {record.filename[:80]!r}")
        if (
            record.compress_type != zipfile.ZIP_STORED
            or record.flag_bits & 1
            or record.compress_size != record.file_size
        ):
            raise FileFormatError(
                f"has the compressed record {record.filename[:80]!r}, which torch.save never writes; unpack "
                "the archive and save it again"
            )
        file.seek(offset + record.header_offset)
        # The extra field, which torch.save pads with, is of another length here than in the directory at the end.
        header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if header[0] != b"PK\x03\x04":
            raise FileFormatError(f"is damaged: the record {record.filename[:80]!r} is not where it should be")
        start = offset + record.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
        spans[record.filename] = Span(path, start, record.file_size)
    end = 0
    for span in sorted(spans.values(), key=lambda span: (span.offset, span.num_bytes)):
        if span.offset < end:
            raise FileFormatError("has records that overlap, which torch.save never writes")
        end = span.offset + span.num_bytes
    if end > path.stat().st_size:
        raise FileFormatError(f"is damaged: its records reach byte {end:,}, and it has {path.stat().st_size:,}")
    return spans


def _bytes(file: BinaryIO, span: Span) -> bytes:
    if span.num_bytes > MAX_PICKLE:
        raise FileFormatError(f"has a pickle of {span.num_bytes:,} bytes, which no file of tensors needs")
    file.seek(span.offset)
    return file.read(span.num_bytes)


def read_legacy(path: Path, *, skip_objects: bool) -> Any:
    """The content of a file that `torch.save` wrote before 1.6: pickles one after the other, then the storages."""
    declared: dict[str, StorageOf] = {}
    found: dict[str, StorageOf] = {}
    size = path.stat().st_size

    def persistent(given: Any) -> Any:
        what, *rest = given
        if what == "module":
            return rest[0]
        kind, key, _device, count, *views = rest
        if what != "storage" or type(count) is not int or (views and views[0] is not None):
            raise FileFormatError("has storages that are views of others, as torch kept them before 0.4")
        known = storage(kind, Span(path, 0, 0))
        num_bytes = count * DTYPES[known.dtype].num_bytes
        if not 0 <= num_bytes <= size:
            raise FileFormatError(f"is damaged: it has {size:,} bytes, and a storage in it {num_bytes:,}")
        return found.get(str(key)) or declared.setdefault(str(key), StorageOf(known.dtype, Span(path, 0, num_bytes)))

    with path.open("rb") as opened:
        file = cast("BinaryIO", Window(opened, 0, min(size, MAX_PICKLE)))

        def read() -> Any:
            return unpickle(file, find=lambda name: find(name, skip_objects=skip_objects), persistent=persistent)

        magic, _version, _system = read(), read(), read()
        assert magic == _LEGACY_MAGIC
        begin = file.tell()
        read()
        keys = read()
        if not isinstance(keys, list):
            raise FileFormatError("is damaged: it has no list of storages")
        position = file.tell()
        for key in map(str, cast("list[Any]", keys)):
            if key not in declared:
                raise FileFormatError(f"is damaged: no tensor needs its storage {key[:40]!r}")
            span = declared[key].span
            opened.seek(position)
            (count,) = struct.unpack("<q", opened.read(8))
            if count * DTYPES[declared[key].dtype].num_bytes != span.num_bytes or position + 8 + span.num_bytes > size:
                raise FileFormatError(f"is damaged: it ends within the storage {key[:40]!r}")
            found[key] = StorageOf(declared[key].dtype, Span(path, position + 8, span.num_bytes))
            position += 8 + span.num_bytes
        # Where the storages are is known only now, and the tensors came before them: the pickle is read again.
        if found.keys() != declared.keys():
            raise FileFormatError("is damaged: a storage is missing")
        file.seek(begin)
        return read()


class Window(io.RawIOBase):
    """A stretch of a file as a file of its own. However many bytes are asked for, it takes memory for those it has."""

    def __init__(self, file: BinaryIO, offset: int, num_bytes: int) -> None:
        self._file = file
        self._offset = offset
        self._num_bytes = num_bytes
        self._place = 0

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where it stands, from the beginning of the stretch."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Stands elsewhere, also behind the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._place = base + offset
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """So many bytes, or those that are left."""
        return self._take(size, self._file.read)

    def readline(self, size: int | None = -1) -> bytes:
        """What is left of the line."""
        return self._take(size, self._file.readline)

    def _take(self, size: int | None, function: Callable[[int], bytes]) -> bytes:
        left = max(self._num_bytes - self._place, 0)
        self._file.seek(self._offset + self._place)
        data = function(left if size is None or size < 0 else min(size, left))
        self._place += len(data)
        return data
