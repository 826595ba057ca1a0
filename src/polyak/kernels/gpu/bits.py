"""Arithmetic on bits for the kernels in Triton: fused sums, float formats, random bits, rounding by chance.

The definitions are those of `rounding`; here they are 32-bit operations, of which a memory-bound kernel on an H200 has
about twenty an element to spend.
"""

# ruff: noqa: N803  # constants of a kernel are upper case

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fma(x, y, z, INTERPRETED: tl.constexpr):
    """`x * y + z`, rounded once; the interpreter's own would round twice."""
    if INTERPRETED:
        product = x.to(tl.float64) * y.to(tl.float64)
        wide = z.to(tl.float64)
        total = product + wide
        # The product is exact. What the sum rounded away (Knuth's two-sum) makes its last bit odd, which keeps the
        # second rounding, to float32, on the right side of a tie.
        back = total - product
        rest = (product - (total - back)) + (wide - back)
        bits = total.to(tl.int64, bitcast=True)
        away = (rest > 0.0) == (total > 0.0)
        inexact = (tl.abs(rest) > 0.0) & ((bits & 1) == 0)
        bits = bits + tl.where(inexact, tl.where(away, 1, -1), 0)
        return bits.to(tl.float64, bitcast=True).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def widen_bfloat16(bits):
    """The float32 of the 16 bits of a bfloat16, given as int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _exponent_field(x):
    """The exponent of a float32, where it stands in its bits."""
    return x.to(tl.int32, bitcast=True) & 0x7F800000


@triton.jit
def from_fractions(second, first):
    """The second term as float32, exactly: int16 times 2 ** -16 of the last bit of the first, as in `fractions`."""
    power = _exponent_field(first).to(tl.float32, bitcast=True)
    return second.to(tl.float32) * (power * 1.8189894035458565e-12)


@triton.jit
def to_fractions(number, first):
    """The second term of a sum whose first term is given, as int16, rounded to nearest, ties to even."""
    # The bits of 2 ** 127 less those of a power of two are those of its inverse.
    part = number * (0x7F000000 - _exponent_field(first)).to(tl.float32, bitcast=True)
    # From -2 ** -24 to 32767 * 2 ** -39; a NaN is the lowest.
    part = tl.where(part > -5.9604644775390625e-08, part, -5.9604644775390625e-08)
    part = tl.where(part < 5.960282578598708e-08, part, 5.960282578598708e-08)
    # Beside 1.5 * 2 ** 23 there is no room for a fraction, and the lowest 16 bits are those of the whole number.
    return (part * 549755813888.0 + 12582912.0).to(tl.int32, bitcast=True).to(tl.int16)


@triton.jit
def mix64(z):
    """The finalizer of SplitMix64, on one uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def random_bits(places, lower, upper):
    """32 random bits for each place; all are uint32.

    `upper` is the upper half of the key times the last factor: `(x + key) * c` is `x * c + key * c`, one operation.
    """
    x = places ^ lower
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35 + upper
    return x ^ (x >> 16)


@triton.jit
def _carry(words, outward, random, EVEN: tl.constexpr):
    """-1, 0 or 1 last bits of float32: the fraction of one that `outward` is, and 16 random bits.

    Args:
        words: the bits of the number.
        outward: what is to be added to its magnitude.
        random: uint32.
        EVEN: the bits of the power of two about which 16 bits have the same last bit; below all others it is half.
    """
    field = words & 0x7F800000
    # 2 ** 16 over the last bit, by its bits: 293 = 127 + 127 + 23 + 16, and the difference fits after it wrapped.
    scale = tl.where(field < 39 << 23, 0, -0x6D800000 - field)
    is_power = ((words & 0x7FFFFF) == 0) & (field != EVEN) & (outward < 0.0)
    worth = tl.where(is_power, outward + outward, outward)
    last_bits = worth * scale.to(tl.float32, bitcast=True)
    last_bits = tl.minimum(tl.maximum(last_bits, -65536.0), 65536.0).to(tl.int32)
    return (last_bits + (random & 0xFFFF).to(tl.int32)) >> 16


@triton.jit
def round_bfloat16(high, low, random):
    """`high + low` by chance to one of the two bfloat16 about it, as int16."""
    words = high.to(tl.int32, bitcast=True)
    field = _exponent_field(high)
    outward = (low.to(tl.int32, bitcast=True) ^ (words & -0x80000000)).to(tl.float32, bitcast=True)
    rounded = (words & 0x7FFFFFFF) + _carry(words, outward, random, 0) + (random >> 16).to(tl.int32)
    rounded = tl.minimum(rounded, 0x7F7FFFFF) | (words & -0x80000000)
    special = tl.where(high != high, words | 0x400000, words)
    return (tl.where(field == 0x7F800000, special, rounded) >> 16).to(tl.int16)


@triton.jit
def round_float16(high, low, random):
    """`high + low` by chance to one of the two float16 about it, as int16."""
    words = high.to(tl.int32, bitcast=True)
    magnitude = words & 0x7FFFFFFF
    field = _exponent_field(high)
    outward = (low.to(tl.int32, bitcast=True) ^ (words & -0x80000000)).to(tl.float32, bitcast=True)
    rounded = magnitude + _carry(words, outward, random, 0x38800000) + (random >> 19).to(tl.int32)
    rounded = tl.minimum((rounded >> 13) - (112 << 10), 0x7BFF)
    # Below 2 ** -14 they are multiples of 2 ** -24: 20 bits of a fraction, and 20 random bits; 31 bits in all.
    fixed = (tl.minimum(magnitude, 0x38800000).to(tl.float32, bitcast=True) * 17592186044416.0).to(tl.int32)
    rest = tl.minimum(tl.maximum(outward * 17592186044416.0, -1048576.0), 1048576.0).to(tl.int32)
    fixed = tl.maximum(fixed + rest + (random >> 12).to(tl.int32), 0) >> 20
    rounded = tl.where(magnitude < 0x38800000, fixed, rounded)
    special = tl.where(high != high, 0x7E00, 0x7C00)
    return (tl.where(field == 0x7F800000, special, rounded) | ((words >> 16) & 0x8000)).to(tl.int16)
