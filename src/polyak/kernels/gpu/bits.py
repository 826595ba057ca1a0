"""Arithmetic on bits for the kernels in Triton: fused sums, float formats, random bits, stochastic rounding.

The definitions are those of `rounding`; here they are 32-bit operations, of which a memory-bound kernel on an H200 has
about twenty an element to spend.
"""

# ruff: noqa: N803  # constants of a kernel are upper case

from __future__ import annotations

import triton
import triton.language as tl

from .constants import FIRST_FACTOR, FLOAT32_EXPONENT, LAST_FACTOR

_SIGN = tl.constexpr(-0x80000000)
# The bits of 2 ** 23 + 2 ** 16. From 2 ** 23 on float32 has whole numbers only: its lowest bits are the number's.
_OFFSET = tl.constexpr(0x4B010000)
# Its upper half. `_carry` returns the carry plus this.
_CARRIED = tl.constexpr(0x4B01)
# What a second term counts in, of a power of two; its inverse; and its smallest and largest number.
_FRACTION, _FRACTIONS = tl.constexpr(2.0**-39), tl.constexpr(2.0**39)
_LOWEST_FRACTION, _HIGHEST_FRACTION = tl.constexpr(-(2.0**-24)), tl.constexpr(32767 * 2.0**-39)
_WHOLE = tl.constexpr(1.5 * 2.0**23)


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
    return x.to(tl.int32, bitcast=True) & FLOAT32_EXPONENT


@triton.jit
def from_fractions(second, first):
    """The second term as float32, exactly: int16 times 2 ** -16 of the last bit of the first, as in `compensated`."""
    power = _exponent_field(first).to(tl.float32, bitcast=True)
    return second.to(tl.float32) * (power * _FRACTION)


@triton.jit
def to_fractions(number, first):
    """The second term of a sum whose first term is given, as int16, rounded to nearest, ties to even."""
    # The bits of 2 ** 127 less those of a power of two are those of its inverse.
    scaled = number * (0x7F000000 - _exponent_field(first)).to(tl.float32, bitcast=True)
    # A NaN is the lowest.
    scaled = tl.where(scaled > _LOWEST_FRACTION, scaled, _LOWEST_FRACTION)
    scaled = tl.where(scaled < _HIGHEST_FRACTION, scaled, _HIGHEST_FRACTION)
    # Beside this there is no room for a fraction, and the lowest 16 bits are those of the whole number.
    return (scaled * _FRACTIONS + _WHOLE).to(tl.int32, bitcast=True).to(tl.int16)


@triton.jit
def mix64(z):
    """The finalizer of SplitMix64, on one uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def random_bits(pairs, lower, upper):
    """32 random bits for each pair of neighbours; all are uint32.

    `upper` is the upper half of the key times the last factor: `(x + key) * c` is `x * c + key * c`, one operation.
    """
    x = pairs ^ lower
    x = (x ^ (x >> 16)) * FIRST_FACTOR
    x = (x ^ (x >> 13)) * LAST_FACTOR + upper
    return x ^ (x >> 16)


@triton.jit
def halves(words, is_odd):
    """The upper and the lower half of each element's random bits, as int32, with the bits of `_OFFSET` set.

    An element at an odd place has the halves of its pair's word swapped.
    """
    first = ((words >> 16) | _OFFSET).to(tl.int32)
    second = ((words & 0xFFFF) | _OFFSET).to(tl.int32)
    return tl.where(is_odd, second, first), tl.where(is_odd, first, second)


@triton.jit
def _carry(half, lower):
    """The carry, in last bits of float32, plus `_CARRIED`.

    Args:
        half: half the fraction of a last bit that is to be added.
        lower: the lower half of the random bits, as from `halves`.
    """
    # The product with 2 ** 17 is exact, so the interpreter, which rounds it, has the same sum.
    return tl.fma(half, 131072.0, lower.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) >> 16


@triton.jit
def round_bfloat16(high, low, upper, lower):
    """`high + low` stochastically rounded to bfloat16, as int16; the halves are as from `halves`."""
    words = high.to(tl.int32, bitcast=True)
    inner = words + ((words ^ low.to(tl.int32, bitcast=True)) >> 31)
    # With its sign, 2 ** (126 - e) for the biased exponent e of `inner`; times 2 ** 23, half the inverse of a last bit.
    power = ((253 << 23) - (inner & -0x800000)).to(tl.float32, bitcast=True)
    # The carry, at least -1, less the `_OFFSET` that `upper` contains.
    carry = tl.maximum(_carry(low * 8388608.0 * power, lower) - (_CARRIED + _OFFSET), -1 - _OFFSET)
    rounded = words + upper + carry
    return (tl.where(tl.abs(high) < 8.507059173023462e37, rounded, words) >> 16).to(tl.int16)


@triton.jit
def round_float16(high, low, upper, lower):
    """`high + low` stochastically rounded to float16, as int16; the halves are as from `halves`."""
    words = high.to(tl.int32, bitcast=True)
    size = tl.abs(high)
    # Scaled by 2 ** -112, a number has the same exponent in both dtypes, and is subnormal in both or in neither.
    shifted = tl.minimum(size, 65504.0) * 1.925929944387236e-34
    lost = size - shifted * 5.192296858534828e33
    outward = (low.to(tl.int32, bitcast=True) ^ (words & _SIGN)).to(tl.float32, bitcast=True) + lost
    shifted_bits = shifted.to(tl.int32, bitcast=True)
    inner = (shifted_bits + (outward.to(tl.int32, bitcast=True) >> 31)) & FLOAT32_EXPONENT
    # Half the inverse of a last bit. Subnormal numbers have the last bit of the smallest normal one.
    power = ((164 << 23) - tl.maximum(inner, 1 << 23)).to(tl.float32, bitcast=True)
    rounded = (shifted_bits + _carry(outward * power, lower)) * 8 + upper
    rounded = tl.minimum(tl.maximum(rounded - (8 * _CARRIED + _OFFSET), 0), 0x7BFF0000)
    rounded = tl.where(size < float("inf"), rounded, words << 3)
    return (((rounded & 0x7FFFFFFF) | (words & _SIGN)) >> 16).to(tl.int16)
