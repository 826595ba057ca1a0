"""A stretch of a file, for what reads whole files."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO


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
