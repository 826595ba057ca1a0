"""Numbers from their bytes, for each dtype that can be averaged; numpy knows not all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

_OF_NUMPY: Mapping[str, str] = {
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "complex64": "<c8",
    "complex128": "<c16",
}
# Bits of the exponent and of the fraction, and what is subtracted from the exponent.
_EIGHT_BITS: Mapping[str, tuple[int, int, int]] = {
    "float8_e4m3fn": (4, 3, 7),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2": (5, 2, 15),
    "float8_e5m2fnuz": (5, 2, 16),
    "float8_e8m0fnu": (8, 0, 127),
}
DTYPES = frozenset({*_OF_NUMPY, *_EIGHT_BITS, "bfloat16"})


def raw_type(dtype: str) -> np.dtype[Any]:
    """What the bytes of a dtype are to numpy before they are decoded."""
    return np.dtype(_OF_NUMPY.get(dtype, "<u2" if dtype == "bfloat16" else "u1"))


def decode(raw: Array, dtype: str) -> Array:
    """The numbers that were read as `raw_type` says, none of them changed.

    Example:
        >>> decode(np.array([0x3F80, 0xC000], np.uint16), "bfloat16").tolist()
        [1.0, -2.0]
        >>> decode(np.array([0x38, 0x7F], np.uint8), "float8_e4m3fn").tolist()
        [1.0, nan]
    """
    if dtype in _OF_NUMPY:
        return raw
    if dtype == "bfloat16":
        # It is the upper half of a float32.
        return cast("Any", raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _table(dtype)[raw]


def wide(numbers: Array) -> Array:
    """Numbers in 64 bits, or in twice that where they are complex."""
    return numbers.astype(np.complex128 if np.iscomplexobj(numbers) else np.float64, copy=False)


@cache
def _table(dtype: str) -> Array:
    """The number that each byte stands for."""
    return np.array([_number(byte, dtype) for byte in range(256)], np.float32)


def _number(byte: int, dtype: str) -> float:
    exponent_bits, fraction_bits, bias = _EIGHT_BITS[dtype]
    exponent = byte >> fraction_bits & (1 << exponent_bits) - 1
    fraction = byte & (1 << fraction_bits) - 1
    largest = exponent == (1 << exponent_bits) - 1
    if dtype == "float8_e8m0fnu":
        return math.nan if largest else 2.0 ** (exponent - bias)
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
    scale = 2.0 ** (max(exponent, 1) - bias - fraction_bits)
    return sign * scale * (fraction + (1 << fraction_bits if exponent else 0))
