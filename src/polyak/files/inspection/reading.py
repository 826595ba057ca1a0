"""Numbers of tensors, read from their files a part at a time, so that little memory is ever in use."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import TracebackType

import numpy as np

from polyak.errors import FileFormatError
from polyak.files.containers import ITEM_SIZES, Between, Leaf, Pieced, Stored, parts_of

from .decoding import Array, decode, raw_type, wide
from .regions import Region, common, covered, sizes

_MAX_OPEN = 32


class Files:
    """Files that are read a stretch at a time. They are not mapped: mapped pages count as memory of the process.

    Args:
        in_order: whether they are read from the beginning to the end, or here and there.
    """

    def __init__(self, *, in_order: bool = False) -> None:
        self._in_order = in_order
        self._files: dict[Path, io.FileIO] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def bytes(self, path: Path, offset: int, num_bytes: int) -> bytearray:
        """A stretch of a file.

        Raises:
            FileFormatError: the file ends before.
        """
        file = self._open(path)
        file.seek(offset)
        whole = bytearray(num_bytes)
        rest = memoryview(whole)
        while rest:
            count = file.readinto(rest)
            if not count:
                raise FileFormatError(f"{os.fspath(path)!r} has become shorter since it was opened")
            rest = rest[count:]
        return whole

    def expect(self, leaf: Leaf, region: Region) -> None:
        """Tells the system what will be read: a disk is faster with many wishes at once than with one at a time."""
        for stored in parts_of(leaf):
            if isinstance(stored, Stored) and hasattr(os, "posix_fadvise"):
                first, count = covered(stored, region)
                size = ITEM_SIZES[stored.dtype]
                place = stored.span.offset + first * size
                os.posix_fadvise(self._open(stored.span.path).fileno(), place, count * size, os.POSIX_FADV_WILLNEED)

    def numbers(self, leaf: Leaf, region: Region) -> Array:
        """The numbers in a region, in an array of its shape, none of them changed."""
        match leaf:
            case Stored():
                return self._stored(leaf, region)
            case Pieced():
                whole = np.zeros(sizes(region), decode(np.empty(0, raw_type(leaf.dtype)), leaf.dtype).dtype)
                for offset, piece in leaf.pieces:
                    shared = common(region, offset, piece.shape)
                    if shared is not None:
                        inside = tuple((begin - at, end - at) for (begin, end), at in zip(shared, offset, strict=True))
                        place = tuple(
                            slice(begin - start, end - start)
                            for (begin, end), (start, _) in zip(shared, region, strict=True)
                        )
                        whole[place] = self._stored(piece, inside)
                return whole
            case Between():
                start, end = (wide(self._stored(part, region)) for part in (leaf.start, leaf.end))
                return start + leaf.weight * (end - start)

    def _stored(self, stored: Stored, region: Region) -> Array:
        first, count = covered(stored, region)
        size = ITEM_SIZES[stored.dtype]
        raw = np.frombuffer(
            self.bytes(stored.span.path, stored.span.offset + first * size, count * size), raw_type(stored.dtype)
        )
        shape = sizes(region)
        if stored.stride != (1,):
            strides = tuple(step * size for step in stored.stride)
            raw = np.lib.stride_tricks.as_strided(raw, shape, strides, writeable=False)
        return decode(raw, stored.dtype)

    def _open(self, path: Path) -> io.FileIO:
        if path not in self._files:
            if len(self._files) == _MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            file = path.open("rb", buffering=0)
            # Only what is asked for: what the system reads ahead would be many times that.
            if not self._in_order and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            self._files[path] = file
        return self._files[path]
