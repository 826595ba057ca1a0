"""The kernels in Triton: one launch goes through a table and updates every average of every row.

Each program takes one chunk, reads the source once and moves all its averages. What a row's dtypes and mode ask for is
code of its own, compiled only where the table has such rows, and chosen by one number for the whole chunk.
"""

# ruff: noqa: N803, N806  # constants of a kernel are upper case

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


@triton.jit
def pointers(address, start, offsets, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to elements; where the chunk is one for vectors the compiler is told how they are aligned."""
    base = address.to(tl.pointer_type(dtype)) + start
    if VECTOR > 1:
        base = tl.multiple_of(base, VECTOR * dtype.primitive_bitwidth // 8)
    return base + offsets


@triton.jit
def _load(address, start, offsets, mask, FORMAT: tl.constexpr, VECTOR: tl.constexpr):
    """Elements as float32. The formats are 0: float32, 1: bfloat16, 2: float16."""
    if FORMAT == 0:
        return tl.load(pointers(address, start, offsets, tl.float32, VECTOR), mask=mask, other=0.0)
    if FORMAT == 1:
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
def _moved(average, source, base, factor, INTERPRETED: tl.constexpr):
    """The new average as `high + low`; see `rounding`. `base` and `factor` depend on the weight."""
    difference = source - average
    high = fma(difference, factor, base, INTERPRETED)
    return high, difference * factor - (high - base)


@triton.jit
def _update(
    record,
    start,
    packed,
    step,
    weights,
    SETTLED: tl.constexpr,
    SOURCE: tl.constexpr,
    FORM: tl.constexpr,
    VECTOR: tl.constexpr,
    PROFILES: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """All averages of one chunk; forms and sources are numbered as in `table`."""
    count = ((packed >> 32) & 0xFFFF).to(tl.int32)
    if VECTOR > 1:
        # What makes the mask of a vector one bit.
        count = tl.multiple_of(count, VECTOR)
    source_address = tl.load(record)
    STOCHASTIC: tl.constexpr = FORM >= 2
    COMPENSATED: tl.constexpr = FORM == 1
    if STOCHASTIC:
        place = tl.load(record + 2) + start
        pair = place >> 1
        part = (pair >> 32).to(tl.uint64)
        key = mix64(step ^ tl.load(record + 1).to(tl.uint64) ^ (part * 0x9E3779B97F4A7C15))
        lower_key = key.to(tl.uint32)
        upper_key = (key >> 32).to(tl.uint32) * 0xC2B2AE35
        # A chunk for vectors begins at an even place. The compiler sees that two elements share a word, and draws once.
        number = tl.arange(0, BLOCK) if VECTOR > 1 else tl.arange(0, BLOCK) + (place & 1).to(tl.int32)
        pairs = pair.to(tl.uint32) + (number >> 1).to(tl.uint32)
    begin = 0
    while begin < count:
        here = begin + tl.arange(0, BLOCK)
        source = _load(source_address, start, here, here < count, SOURCE, VECTOR)
        if STOCHASTIC:
            words = random_bits(pairs + (begin >> 1).to(tl.uint32), lower_key, upper_key)
            upper, lower = halves(words, (number & 1) == 1)
        for profile in tl.static_range(PROFILES):
            w = tl.load(weights + profile) if SETTLED else weights[profile]
            w = w.to(tl.float32)
            copied = w == 2.0
            # A weight of -1 leaves the average: nothing is read and nothing written.
            mask = here < tl.where(w >= 0.0, count, 0)
            address = tl.load(record + 3 + profile)
            if STOCHASTIC:
                average = _load(address, start, here, mask, FORM - 1, VECTOR)
                if copied:
                    # A NaN with bits in its lower half only would be truncated to an infinity.
                    high = tl.where(source == source, source, float("nan"))
                    low = tl.zeros_like(source)
                elif w < 0.5:
                    high, low = _moved(average, source, average, w, INTERPRETED)
                else:
                    high, low = _moved(average, source, source, w - 1.0, INTERPRETED)
                bits = round_bfloat16(high, low, upper, lower) if FORM == 2 else round_float16(high, low, upper, lower)
                tl.store(pointers(address, start, here, tl.int16, VECTOR), bits, mask=mask)
            else:
                average = _load(address, start, here, mask, 0, VECTOR)
                if COMPENSATED:
                    second_address = tl.load(record + 3 + PROFILES + profile)
                    seconds = pointers(second_address, start, here, tl.int16, VECTOR)
                    second = from_fractions(tl.load(seconds, mask=mask, other=0), average)
                    change = _lerp(second, source - average, w, INTERPRETED)
                    moved = average + change
                    second_bits = to_fractions((average - moved) + change, moved)
                    tl.store(seconds, tl.where(copied, 0, second_bits).to(tl.int16), mask=mask)
                else:
                    moved = _lerp(average, source, w, INTERPRETED)
                moved = tl.where(copied, source, moved)
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
    chunk = chunks + 2 * tl.program_id(0)
    start = tl.load(chunk)
    packed = tl.load(chunk + 1)
    record = rows + (packed & 0xFFFFFFFF) * (3 + 2 * PROFILES)
    kind = (packed >> 48).to(tl.int32)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            _update(
                record,
                start,
                packed,
                step,
                weights,
                SETTLED,
                KINDS[i] // 2 % 3,
                KINDS[i] // 6,
                # Triton gives all blocks of one shape that depend on one another loads and stores of one width, and
                # what does not fit goes through shared memory; so those without vectors have another shape.
                4 if KINDS[i] % 2 else 1,
                PROFILES,
                BLOCK if KINDS[i] % 2 else BLOCK // 2,
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
        weights: one a profile, as a tuple of numbers; 2 copies, and -1 leaves.
        KINDS: those in the table.
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
    step = tl.load(counts + 2).to(tl.uint64)
    _dispatch(rows, chunks, step, weights, True, KINDS, PROFILES, BLOCK, INTERPRETED)
