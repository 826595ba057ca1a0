"""The dtypes that files have, and what each is called where: one table, without torch and without numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Float8:
    """How a number lies in 8 bits.

    Attributes:
        exponent: its number of bits.
        fraction: its number of bits.
        bias: what is subtracted from the exponent.
    """

    exponent: int
    fraction: int
    bias: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Dtype:
    """A dtype.

    Attributes:
        name: torch's.
        num_bytes: of a number.
        is_inexact: whether its numbers are of floating point or complex: those that are averaged.
        numpy: numpy's code, without the order of the bytes; None if numpy does not have it.
        struct: the code in `struct`, for single numbers; None if that does not have it.
        safetensors: the code in the safetensors format; None if that does not have it.
        storages: torch's storages with such numbers, in pickles.
        float8: how it is decoded.
    """

    name: str
    num_bytes: int
    is_inexact: bool = False
    numpy: str | None = None
    struct: str | None = None
    safetensors: str | None = None
    storages: tuple[str, ...] = ()
    float8: Float8 | None = None


_FLOAT8 = (
    ("float8_e4m3fn", "F8_E4M3", Float8(exponent=4, fraction=3, bias=7)),
    ("float8_e5m2", "F8_E5M2", Float8(exponent=5, fraction=2, bias=15)),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ", Float8(exponent=4, fraction=3, bias=8)),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ", Float8(exponent=5, fraction=2, bias=16)),
    ("float8_e8m0fnu", "F8_E8M0", Float8(exponent=8, fraction=0, bias=127)),
)
# Name, bytes, and the codes of numpy, struct and safetensors.
_INTEGERS = (
    ("bool", 1, "b1", "?", "BOOL", ("BoolStorage",)),
    ("uint8", 1, "u1", "B", "U8", ("ByteStorage", "UntypedStorage", "QUInt8Storage")),
    ("int8", 1, "i1", "b", "I8", ("CharStorage", "QInt8Storage")),
    ("int16", 2, "i2", "h", "I16", ("ShortStorage",)),
    ("uint16", 2, "u2", "H", "U16", ()),
    ("int32", 4, "i4", "i", "I32", ("IntStorage", "QInt32Storage")),
    ("uint32", 4, "u4", "I", "U32", ()),
    ("int64", 8, "i8", "q", "I64", ("LongStorage",)),
    ("uint64", 8, "u8", "Q", "U64", ()),
)
_INEXACT = (
    ("float16", 2, "f2", "e", "F16", "HalfStorage"),
    ("bfloat16", 2, None, None, "BF16", "BFloat16Storage"),
    ("float32", 4, "f4", "f", "F32", "FloatStorage"),
    ("float64", 8, "f8", "d", "F64", "DoubleStorage"),
    ("complex64", 8, "c8", None, "C64", "ComplexFloatStorage"),
    ("complex128", 16, "c16", None, None, "ComplexDoubleStorage"),
)
DTYPES: Mapping[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        *(
            Dtype(name=name, num_bytes=size, numpy=numpy, struct=struct, safetensors=code, storages=storages)
            for name, size, numpy, struct, code, storages in _INTEGERS
        ),
        *(
            Dtype(name=name, num_bytes=1, is_inexact=True, safetensors=code, float8=float8)
            for name, code, float8 in _FLOAT8
        ),
        *(
            Dtype(
                name=name,
                num_bytes=size,
                is_inexact=True,
                numpy=numpy,
                struct=struct,
                safetensors=code,
                storages=(storage,),
            )
            for name, size, numpy, struct, code, storage in _INEXACT
        ),
    )
}
BY_SAFETENSORS: Mapping[str, Dtype] = {dtype.safetensors: dtype for dtype in DTYPES.values() if dtype.safetensors}
BY_STORAGE: Mapping[str, Dtype] = {storage: dtype for dtype in DTYPES.values() for storage in dtype.storages}
BY_NUMPY: Mapping[str, Dtype] = {dtype.numpy: dtype for dtype in DTYPES.values() if dtype.numpy}
