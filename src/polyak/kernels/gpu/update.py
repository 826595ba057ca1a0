"""The kernels in Triton: one launch goes through a table and updates every average of every row.

Each program takes one chunk, reads the source once and moves all its averages. What a row's dtypes and mode ask for is
code of its own, compiled only where the table has such rows, and chosen by one number for the whole chunk. Each mode is
one function, which `_update` calls between its loads and stores.
"""

# ruff: noqa: N803  # constants of a kernel are upper case

from __future__ import annotations

import triton
import triton.language as tl

from .bits import (
    fma,
    from_fractions,
    halves,
    mix64,
    random_bits,
    round_bfloat16,
    round_float16,
    to_fractions,
    widen_bfloat16,
)
from .constants import (
    AVERAGE_COLUMNS,
    BFLOAT16,
    CHUNK_COLUMNS,
    COMPENSATED,
    COPIES,
    COUNT_MASK,
    COUNT_SHIFT,
    FIRST_COLUMN,
    FLOAT32,
    KEY_COLUMN,
    KIND_SHIFT,
    LAST_FACTOR,
    PACKED,
    PLAIN,
    ROW_MASK,
    SOURCE_COLUMN,
    START,
    STEP_KEY,
    STOCHASTIC,
    STRIDE,
)


@triton.jit
def pointers(address, start, offsets, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to elements; where the chunk is one for vectors the compiler is told how they are aligned."""
    base = address.to(tl.pointer_type(dtype)) + start
    if VECTOR > 1:
        base = tl.multiple_of(base, VECTOR * dtype.primitive_bitwidth // 8)
    return base + offsets


@triton.jit
def _load(address, start, offsets, mask, FORMAT: tl.constexpr, VECTOR: tl.constexpr):
    """Elements as float32."""
    if FORMAT == FLOAT32:
        return tl.load(pointers(address, start, offsets, tl.float32, VECTOR), mask=mask, other=0.0)
    if FORMAT == BFLOAT16:
        return widen_bfloat16(tl.load(pointers(address, start, offsets, tl.int16, VECTOR), mask=mask, other=0))
    return tl.load(pointers(address, start, offsets, tl.float16, VECTOR), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _lerp(average, source, w, INTERPRETED: tl.constexpr):
    """torch.lerp: `fma(w, s - a, a)` for w < 1/2, else `fma(-(s - a), 1 - w, s)`."""
    lower = w < 0.5
    # The minus is on the weight, which is one for all elements; -(1 - w) is w - 1, exactly.
    factor = tl.where(lower, w, w - 1.0)
    return fma(source - average, factor, tl.where(lower, average, source), INTERPRETED)


@triton.jit
def _plain(average, source, w, INTERPRETED: tl.constexpr):
    """The new average."""
    return tl.where(w == COPIES, source, _lerp(average, source, w, INTERPRETED))


@triton.jit
def _compensated(average, second, source, w, INTERPRETED: tl.constexpr):
    """The new average and its second term; the terms are fractions, as int16."""
    change = _lerp(from_fractions(second, average), source - average, w, INTERPRETED)
    moved = average + change
    left = to_fractions((average - moved) + change, moved)
    copied = w == COPIES
    return tl.where(copied, source, moved), tl.where(copied, 0, left).to(tl.int16)


@triton.jit
def _sum(average, source, base, factor, INTERPRETED: tl.constexpr):
    """The new average as `high + low`; see `rounding`. `base` and `factor` depend on the weight."""
    difference = source - average
    high = fma(difference, factor, base, INTERPRETED)
    return high, difference * factor - (high - base)


@triton.jit
def _stochastic(average, source, w, upper, lower, AVERAGE: tl.constexpr, INTERPRETED: tl.constexpr):
    """The bits of the new average, as int16; the halves of the random bits are as from `halves`."""
    if w == COPIES:
        # A NaN with bits in its lower half only would be truncated to an infinity.
        high = tl.where(source == source, source, float("nan"))
        low = tl.zeros_like(source)
    elif w < 0.5:
        high, low = _sum(average, source, average, w, INTERPRETED)
    else:
        high, low = _sum(average, source, source, w - 1.0, INTERPRETED)
    return round_bfloat16(high, low, upper, lower) if AVERAGE == BFLOAT16 else round_float16(high, low, upper, lower)


@triton.jit
def _update(
    record,
    start,
    packed,
    step,
    weights,
    SETTLED: tl.constexpr,
    SOURCE: tl.constexpr,
    AVERAGE: tl.constexpr,
    MODE: tl.constexpr,
    VECTOR: tl.constexpr,
    PROFILES: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """All averages of one chunk; formats and modes are numbered as in `encoding`."""
    count = ((packed >> COUNT_SHIFT) & COUNT_MASK).to(tl.int32)
    if VECTOR > 1:
        # What makes the mask of a vector one bit.
        count = tl.multiple_of(count, VECTOR)
    source_address = tl.load(record + SOURCE_COLUMN)
    if MODE == STOCHASTIC:
        place = tl.load(record + FIRST_COLUMN) + start
        pair = place >> 1
        segment = (pair >> 32).to(tl.uint64)
        key = mix64(step ^ tl.load(record + KEY_COLUMN).to(tl.uint64) ^ (segment * STRIDE))
        lower_key = key.to(tl.uint32)
        upper_key = (key >> 32).to(tl.uint32) * LAST_FACTOR
        # A chunk for vectors begins at an even place. The compiler sees that two elements share a word, and draws once.
        number = tl.arange(0, BLOCK) if VECTOR > 1 else tl.arange(0, BLOCK) + (place & 1).to(tl.int32)
        pairs = pair.to(tl.uint32) + (number >> 1).to(tl.uint32)
    begin = 0
    while begin < count:
        here = begin + tl.arange(0, BLOCK)
        source = _load(source_address, start, here, here < count, SOURCE, VECTOR)
        if MODE == STOCHASTIC:
            words = random_bits(pairs + (begin >> 1).to(tl.uint32), lower_key, upper_key)
            upper, lower = halves(words, (number & 1) == 1)
        for profile in tl.static_range(PROFILES):
            w = tl.load(weights + profile) if SETTLED else weights[profile]
            w = w.to(tl.float32)
            # Of an average that is left nothing is read and nothing written.
            mask = here < tl.where(w >= 0.0, count, 0)
            address = tl.load(record + AVERAGE_COLUMNS + profile)
            average = _load(address, start, here, mask, AVERAGE, VECTOR)
            if MODE == STOCHASTIC:
                bits = _stochastic(average, source, w, upper, lower, AVERAGE, INTERPRETED)
                tl.store(pointers(address, start, here, tl.int16, VECTOR), bits, mask=mask)
            elif MODE == COMPENSATED:
                second_address = tl.load(record + AVERAGE_COLUMNS + PROFILES + profile)
                seconds = pointers(second_address, start, here, tl.int16, VECTOR)
                second = tl.load(seconds, mask=mask, other=0)
                moved, second = _compensated(average, second, source, w, INTERPRETED)
                tl.store(seconds, second, mask=mask)
                tl.store(pointers(address, start, here, tl.float32, VECTOR), moved, mask=mask)
            else:
                tl.static_assert(MODE == PLAIN)
                moved = _plain(average, source, w, INTERPRETED)
                tl.store(pointers(address, start, here, tl.float32, VECTOR), moved, mask=mask)
        begin += BLOCK


@triton.jit
def _dispatch(
    rows,
    chunks,
    step,
    weights,
    SETTLED: tl.constexpr,
    KINDS: tl.constexpr,
    PROFILES: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    chunk = chunks + CHUNK_COLUMNS * tl.program_id(0)
    start = tl.load(chunk + START)
    packed = tl.load(chunk + PACKED)
    record = rows + (packed & ROW_MASK) * (AVERAGE_COLUMNS + 2 * PROFILES)
    kind = (packed >> KIND_SHIFT).to(tl.int32)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i][0]:
            _update(
                record,
                start,
                packed,
                step,
                weights,
                SETTLED,
                KINDS[i][2],
                KINDS[i][3],
                KINDS[i][4],
                # Triton gives all blocks of one shape that depend on one another loads and stores of one width, and
                # what does not fit goes through shared memory; so those without vectors have another shape.
                KINDS[i][1],
                PROFILES,
                BLOCK if KINDS[i][1] > 1 else BLOCK // 2,
                INTERPRETED,
            )


@triton.jit(do_not_specialize=["step"])
def update(
    rows,
    chunks,
    step: tl.uint64,
    weights,
    KINDS: tl.constexpr,
    PROFILES: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Moves every average with the weights given.

    Args:
        rows: of the table.
        chunks: of the table; one program each.
        step: the key of the update.
        weights: one a profile, as a tuple of numbers; `COPIES` and `LEAVES` stand for 1 and 0.
        KINDS: those in the table, as `digits`.
        PROFILES: the number of profiles.
        BLOCK: elements at once.
        INTERPRETED: whether sums that are to be fused have to be fused by hand.
    """
    _dispatch(rows, chunks, step, weights, False, KINDS, PROFILES, BLOCK, INTERPRETED)


@triton.jit
def update_settled(
    rows,
    chunks,
    counts,
    weights,
    KINDS: tl.constexpr,
    PROFILES: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The same with the weights and the key that `settle` has left in device memory."""
    step = tl.load(counts + STEP_KEY).to(tl.uint64)
    _dispatch(rows, chunks, step, weights, True, KINDS, PROFILES, BLOCK, INTERPRETED)
