"""The kernels in Triton that decide, on the device, whether an update is made: a test of the sources, and a verdict."""

# ruff: noqa: N803  # constants of a kernel are upper case

from __future__ import annotations

import triton
import triton.language as tl

from .bits import mix64
from .update import pointers


@triton.jit
def _exponents(address, start, offsets, mask, FORMAT: tl.constexpr, VECTOR: tl.constexpr):
    """Whether the exponent is all ones, as in a NaN or an infinity; the formats are those of `update`."""
    if FORMAT == 0:
        bits = tl.load(pointers(address, start, offsets, tl.int32, VECTOR), mask=mask, other=0)
        ones = 0x7F800000
    else:
        bits = tl.load(pointers(address, start, offsets, tl.int16, VECTOR), mask=mask, other=0).to(tl.int32)
        ones = 0x7F80 if FORMAT == 1 else 0x7C00
    return (bits & ones) == ones


@triton.jit
def find_bad(
    rows,
    chunks,
    flag,
    bad_rows,
    SOURCES: tl.constexpr,
    PROFILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Raises the flag, and that of the row, where a source holds a NaN or an infinity; reads each source once.

    Args:
        rows: of the table.
        chunks: of the table; one program each.
        flag: int32, one.
        bad_rows: int32, one a row.
        SOURCES: the kinds in the table without their forms.
        PROFILES: the number of profiles.
        BLOCK: elements at once.
    """
    chunk = chunks + 2 * tl.program_id(0)
    start = tl.load(chunk)
    packed = tl.load(chunk + 1)
    row = packed & 0xFFFFFFFF
    address = tl.load(rows + row * (3 + 2 * PROFILES))
    kind = (packed >> 48).to(tl.int32) % 6
    for i in tl.static_range(len(SOURCES)):
        if kind == SOURCES[i]:
            vector: tl.constexpr = 4 if SOURCES[i] % 2 else 1
            block: tl.constexpr = BLOCK if SOURCES[i] % 2 else BLOCK // 2
            count = ((packed >> 32) & 0xFFFF).to(tl.int32)
            if vector > 1:
                count = tl.multiple_of(count, vector)
            found = tl.zeros([block], tl.int32)
            begin = 0
            while begin < count:
                here = begin + tl.arange(0, block)
                bad = _exponents(address, start, here, here < count, SOURCES[i] // 2, vector)
                found = found | bad.to(tl.int32)
                begin += block
            if tl.max(found, 0) != 0:
                # Programs that find something write the same, so it does not matter which of them is last.
                tl.store(flag, 1)
                tl.store(bad_rows + row, 1)


@triton.jit
def settle(
    minus_weights,
    minus_pending,
    flag,
    counts,
    weights,
    PROFILES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Decides about the update to come, and leaves its weights and its key; one program.

    Args:
        minus_weights: float64, `expm1(-pending)`, one a profile.
        minus_pending: float64, one a profile, zero after an update; and one more, which is not zero where an update is
            due, and zero afterwards.
        flag: int32, one; whether the step is bad; zero afterwards.
        counts: int64: updates made, updates left out, the key of the update to come, the mixed seed, and the verdict:
            1 where the update is to be made.
        weights: float32, one a profile: as `update.update` takes them.
        PROFILES: the number of profiles.
        SIZE: the power of two that holds them.
    """
    profiles = tl.arange(0, SIZE)
    inside = profiles < PROFILES
    is_due = tl.load(minus_pending + PROFILES) != 0.0
    is_bad = tl.load(flag) != 0
    is_made = is_due & (is_bad == 0)
    weight = 0.0 - tl.load(minus_weights + profiles, mask=inside, other=0.0)
    left = (is_made == 0) | (weight == 0.0)
    tl.store(weights + profiles, tl.where(left, -1.0, tl.where(weight == 1.0, 2.0, weight.to(tl.float32))), mask=inside)
    pending = tl.load(minus_pending + profiles, mask=inside, other=0.0)
    tl.store(minus_pending + profiles, tl.where(is_made, 0.0, pending), mask=inside)
    tl.store(minus_pending + PROFILES, 0.0)
    tl.store(flag, 0)
    number = tl.load(counts)
    key = mix64((tl.load(counts + 3) + (number + 1) * -0x61C8864680B583EB).to(tl.uint64))
    tl.store(counts + 2, key.to(tl.int64))
    tl.store(counts, tl.where(is_made, number + 1, number))
    skipped = tl.load(counts + 1)
    tl.store(counts + 1, tl.where(is_due & is_bad, skipped + 1, skipped))
    tl.store(counts + 4, is_made.to(tl.int64))


@triton.jit
def copy_settled(chunks, counts, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    """Copies memory, where `settle` decided for an update.

    Args:
        chunks: int64: the address to read, the address to write, how many numbers, of how many bytes; one program each.
        counts: those of `settle`.
        SIZES: the bytes of a number, each that is in the table.
        BLOCK: numbers at once.
    """
    chunk = chunks + 4 * tl.program_id(0)
    count = tl.where(tl.load(counts + 4) != 0, tl.load(chunk + 2), 0)
    here = tl.arange(0, BLOCK)
    size = tl.load(chunk + 3)
    for i in tl.static_range(len(SIZES)):
        if size == SIZES[i]:
            narrow: tl.constexpr = tl.int8 if SIZES[i] == 1 else tl.int16
            wide: tl.constexpr = tl.int32 if SIZES[i] == 4 else tl.int64
            dtype: tl.constexpr = narrow if SIZES[i] < 4 else wide
            values = tl.load(pointers(tl.load(chunk), 0, here, dtype, 1), mask=here < count, other=0)
            tl.store(pointers(tl.load(chunk + 1), 0, here, dtype, 1), values, mask=here < count)
