"""The kernels in Triton that decide, on the device, whether an update is made: a test of the sources, and a verdict."""

# ruff: noqa: N803  # constants of a kernel are upper case

from __future__ import annotations

import triton
import triton.language as tl

from .bits import mix64
from .constants import (
    AVERAGE_COLUMNS,
    AVERAGE_UNIT,
    BFLOAT16,
    BFLOAT16_EXPONENT,
    CHUNK_COLUMNS,
    COPIES,
    COPY_COLUMNS,
    COUNT_MASK,
    COUNT_SHIFT,
    FLOAT16_EXPONENT,
    FLOAT32,
    FLOAT32_EXPONENT,
    KIND_SHIFT,
    LEAVES,
    MADE,
    MIXED_SEED,
    PACKED,
    ROW_MASK,
    SIGNED_STRIDE,
    SKIPPED,
    SOURCE_COLUMN,
    START,
    STEP_KEY,
    VERDICT,
)
from .update import pointers


@triton.jit
def _exponents(address, start, offsets, mask, FORMAT: tl.constexpr, VECTOR: tl.constexpr):
    """Whether the exponent is all ones, as in a NaN or an infinity."""
    if FORMAT == FLOAT32:
        bits = tl.load(pointers(address, start, offsets, tl.int32, VECTOR), mask=mask, other=0)
        ones = FLOAT32_EXPONENT
    else:
        bits = tl.load(pointers(address, start, offsets, tl.int16, VECTOR), mask=mask, other=0).to(tl.int32)
        ones = BFLOAT16_EXPONENT if FORMAT == BFLOAT16 else FLOAT16_EXPONENT
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
        SOURCES: those of the table: kinds without averages and modes, as `digits`.
        PROFILES: the number of profiles.
        BLOCK: elements at once.
    """
    chunk = chunks + CHUNK_COLUMNS * tl.program_id(0)
    start = tl.load(chunk + START)
    packed = tl.load(chunk + PACKED)
    row = packed & ROW_MASK
    address = tl.load(rows + row * (AVERAGE_COLUMNS + 2 * PROFILES) + SOURCE_COLUMN)
    kind = (packed >> KIND_SHIFT).to(tl.int32) % AVERAGE_UNIT
    for i in tl.static_range(len(SOURCES)):
        if kind == SOURCES[i][0]:
            vector: tl.constexpr = SOURCES[i][1]
            block: tl.constexpr = BLOCK if vector > 1 else BLOCK // 2
            count = ((packed >> COUNT_SHIFT) & COUNT_MASK).to(tl.int32)
            if vector > 1:
                count = tl.multiple_of(count, vector)
            found = tl.zeros([block], tl.int32)
            begin = 0
            while begin < count:
                here = begin + tl.arange(0, block)
                bad = _exponents(address, start, here, here < count, SOURCES[i][2], vector)
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
        counts: int64, as in `encoding`.
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
    encoded = tl.where(weight == 1.0, COPIES, weight.to(tl.float32))
    encoded = tl.where((is_made == 0) | (weight == 0.0), LEAVES, encoded)
    tl.store(weights + profiles, encoded, mask=inside)
    pending = tl.load(minus_pending + profiles, mask=inside, other=0.0)
    tl.store(minus_pending + profiles, tl.where(is_made, 0.0, pending), mask=inside)
    tl.store(minus_pending + PROFILES, 0.0)
    tl.store(flag, 0)
    number = tl.load(counts + MADE)
    key = mix64((tl.load(counts + MIXED_SEED) + (number + 1) * SIGNED_STRIDE).to(tl.uint64))
    tl.store(counts + STEP_KEY, key.to(tl.int64))
    tl.store(counts + MADE, tl.where(is_made, number + 1, number))
    skipped = tl.load(counts + SKIPPED)
    tl.store(counts + SKIPPED, tl.where(is_due & is_bad, skipped + 1, skipped))
    tl.store(counts + VERDICT, is_made.to(tl.int64))


@triton.jit
def copy_settled(chunks, counts, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    """Copies memory, where `settle` decided for an update.

    Args:
        chunks: int64: the address to read, the address to write, how many numbers, of how many bytes; one program each.
        counts: those of `settle`.
        SIZES: the bytes of a number, each that is in the table.
        BLOCK: numbers at once.
    """
    chunk = chunks + COPY_COLUMNS * tl.program_id(0)
    count = tl.where(tl.load(counts + VERDICT) != 0, tl.load(chunk + 2), 0)
    here = tl.arange(0, BLOCK)
    size = tl.load(chunk + 3)
    for i in tl.static_range(len(SIZES)):
        if size == SIZES[i]:
            narrow: tl.constexpr = tl.int8 if SIZES[i] == 1 else tl.int16
            wide: tl.constexpr = tl.int32 if SIZES[i] == 4 else tl.int64
            dtype: tl.constexpr = narrow if SIZES[i] < 4 else wide
            values = tl.load(pointers(tl.load(chunk), 0, here, dtype, 1), mask=here < count, other=0)
            tl.store(pointers(tl.load(chunk + 1), 0, here, dtype, 1), values, mask=here < count)
