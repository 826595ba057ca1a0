"""Numbers of tensors, read from their files a stretch at a time, so that little memory is ever in use."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from polyak.errors import FileFormatError
from polyak.files.dtypes import DTYPES

from .regions import Region, all_regions, common, covered, flattened, sizes, whole
from .stored import Between, Leaf, Pieced, Stored, dense_stride, parts_of

# It is imported where numbers are needed: much can be said of a file without.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

_MAX_OPEN = 32
_STRETCH = 1 << 20


class Reader:
    """Reads numbers from files. They are not mapped: mapped pages count as memory of the process.

    Several threads may use one reader. In a `with`, its files are closed at the end.

    Args:
        in_order: whether files are read from the beginning to the end, or here and there.
    """

    def __init__(self, *, in_order: bool = False) -> None:
        self._in_order = in_order
        self._lock = threading.Lock()
        self._files: dict[Path, _File] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._files.clear()

    def expect(self, leaf: Leaf, region: Region) -> None:
        """Tells the system what will be read: a disk is faster with many requests at once than with one at a time."""
        for stored in parts_of(leaf):
            if isinstance(stored, Stored):
                offset, num_bytes = _place(stored, region)
                self._open(stored.span.path).expect(offset, num_bytes)

    def read(self, leaf: Stored | Pieced, region: Region | None = None) -> bytes:
        """The bytes of a tensor, or of a region of it, as those of a tensor by itself whose numbers lie in order.

        Raises:
            FileFormatError: the file has become shorter.
        """
        region = whole(leaf.shape) if region is None else region
        shape = sizes(region)
        if isinstance(leaf, Stored) and _lies_in_order(leaf.stride, shape):
            return self._span(leaf, region) if math.prod(shape) else b""
        return self._raw(leaf, region).tobytes()

    def stretches(self, leaf: Stored | Pieced, num_bytes: int = _STRETCH) -> Iterator[bytes]:
        """All bytes of a tensor, no more than so many at a time, in the order in which they lie in the file.

        Raises:
            FileFormatError: the file has become shorter.
        """
        (flat,) = flattened([leaf])
        assert not isinstance(flat, Between)
        for region in all_regions([flat], max(num_bytes // DTYPES[leaf.dtype].num_bytes, 1)):
            yield self.read(flat, region)

    def array(self, leaf: Leaf, region: Region | None = None) -> Array:
        """The numbers of a tensor, or of a region of it, in an array of its shape, none of them changed.

        What numpy does not have is in float32; what lies between two tensors is computed, and in 64 bits.

        Raises:
            FileFormatError: the file has become shorter.
        """
        region = whole(leaf.shape) if region is None else region
        if not isinstance(leaf, Between):
            return decode(self._raw(leaf, region), leaf.dtype)
        start, end = (wide(self.array(part, region)) for part in (leaf.start, leaf.end))
        return start + leaf.weight * (end - start)

    def _raw(self, leaf: Stored | Pieced, region: Region) -> Array:
        """Numbers as `raw_type` says."""
        import numpy as np

        shape = sizes(region)
        if not math.prod(shape):
            return np.empty(shape, raw_type(leaf.dtype))
        if isinstance(leaf, Stored):
            raw = np.frombuffer(self._span(leaf, region), raw_type(leaf.dtype))
            if leaf.stride == (1,):
                return raw
            strides = tuple(step * raw.itemsize for step in leaf.stride)
            return np.lib.stride_tricks.as_strided(raw, shape, strides, writeable=False)
        found = np.zeros(shape, raw_type(leaf.dtype))
        for offset, piece in leaf.pieces:
            shared = common(region, offset, piece.shape)
            if shared is not None:
                inside = tuple((begin - at, end - at) for (begin, end), at in zip(shared, offset, strict=True))
                place = tuple(
                    slice(begin - start, end - start) for (begin, end), (start, _) in zip(shared, region, strict=True)
                )
                found[place] = self._raw(piece, inside)
        return found

    def _span(self, stored: Stored, region: Region) -> bytes:
        return self._open(stored.span.path).read(*_place(stored, region))

    def _open(self, path: Path) -> _File:
        with self._lock:
            if path not in self._files:
                if len(self._files) == _MAX_OPEN:
                    self._files.pop(next(iter(self._files)))
                self._files[path] = _File(path, in_order=self._in_order)
            return self._files[path]


class _File:
    """A file that is open as long as anybody uses it, and has no place where the next one reads on."""

    def __init__(self, path: Path, *, in_order: bool) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        # Only what is asked for: what the system reads ahead would be many times that.
        if not in_order and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def expect(self, offset: int, num_bytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, num_bytes: int) -> bytes:
        data = self._read(offset, num_bytes)
        while len(data) < num_bytes:
            more = self._read(offset + len(data), num_bytes - len(data))
            if not more:
                raise FileFormatError(f"{os.fspath(self._path)!r} has become shorter since it was opened")
            data += more
        return data

    def _read(self, offset: int, num_bytes: int) -> bytes:
        if sys.platform != "win32":
            return os.pread(self._descriptor, num_bytes, offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, num_bytes)


def _place(stored: Stored, region: Region) -> tuple[int, int]:
    """Where in the file a region begins, and how many bytes there are up to its last one."""
    first, count = covered(stored, region)
    size = DTYPES[stored.dtype].num_bytes
    return stored.span.offset + first * size, count * size


def _lies_in_order(stride: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    dense = dense_stride(shape)
    return all(count == 1 or step == plain for count, step, plain in zip(shape, stride, dense, strict=True))


def raw_type(dtype: str) -> np.dtype[Any]:
    """What the bytes of a dtype are to numpy before they are decoded."""
    import numpy as np

    known = DTYPES[dtype]
    return np.dtype(f"<{known.numpy or f'u{known.num_bytes}'}")


def decode(raw: Array, dtype: str) -> Array:
    """The numbers that were read as `raw_type` says, none of them changed.

    Example:
        >>> import numpy as np
        >>> decode(np.array([0x3F80, 0xC000], np.uint16), "bfloat16").tolist()
        [1.0, -2.0]
        >>> decode(np.array([0x38, 0x7F], np.uint8), "float8_e4m3fn").tolist()
        [1.0, nan]
    """
    import numpy as np

    if DTYPES[dtype].numpy is not None:
        return raw
    if DTYPES[dtype].float8 is not None:
        return _table(dtype)[raw]
    # bfloat16 is the upper half of a float32.
    return cast("Any", raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def wide(numbers: Array) -> Array:
    """Numbers in 64 bits, or in twice that if they are complex."""
    import numpy as np

    return numbers.astype(np.complex128 if np.iscomplexobj(numbers) else np.float64, copy=False)


@cache
def _table(dtype: str) -> Array:
    """The number that each byte stands for."""
    import numpy as np

    return np.array([_number(byte, dtype) for byte in range(256)], np.float32)


def _number(byte: int, dtype: str) -> float:
    bits = DTYPES[dtype].float8
    assert bits is not None
    exponent = byte >> bits.fraction & (1 << bits.exponent) - 1
    fraction = byte & (1 << bits.fraction) - 1
    largest = exponent == (1 << bits.exponent) - 1
    if dtype == "float8_e8m0fnu":
        return math.nan if largest else 2.0 ** (exponent - bits.bias)
    sign = -1.0 if byte & 0x80 else 1.0
    # "fn": finite, one NaN of each sign; "uz": no negative zero, whose place the NaN takes; else as IEEE 754 has it.
    if dtype.endswith("uz"):
        if byte == 0x80:
            return math.nan
    elif dtype.endswith("fn"):
        if byte & 0x7F == 0x7F:
            return math.nan
    elif largest:
        return math.nan if fraction else sign * math.inf
    scale = 2.0 ** (max(exponent, 1) - bits.bias - bits.fraction)
    return sign * scale * (fraction + (1 << bits.fraction if exponent else 0))
