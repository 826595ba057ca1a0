"""The modes of an update, one tensor at a time, straight from their definitions.

Stochastic rounding. The random bits of an element are a function of four numbers and nothing else:

    step    = mix64(mix64(seed) + number * GOLDEN)
    key     = mix64(step ^ entry ^ (pair >> 32) * GOLDEN)             pair = index // 2
    word    = 32 bits, from pair mod 2 ** 32, the lower half of the key, and its upper half
    bits    = word for an even index, word with its two halves swapped for an odd one

An average in 16 bits, `a`, and a source `s` give in float32 `high = lerp(a, s, weight)` and what that rounded away,
`low`. Their sum lies between two numbers of 16 bits, and goes up with the probability that leaves its mean where it is.
"""

import hashlib
import itertools
import math

import torch

GOLDEN = 0x9E3779B97F4A7C15
MASK_64 = 2**64 - 1
MASK_32 = 2**32 - 1


def lerp(average, source, weight):
    """In the average's dtype; complex numbers as pairs; a weight of 1 copies and a weight of 0 leaves."""
    source = source.to(average.dtype)
    if weight in (0.0, 1.0):
        return (average if weight == 0.0 else source).clone()
    if average.is_complex():
        return torch.view_as_complex(torch.lerp(torch.view_as_real(average), torch.view_as_real(source), weight))
    return torch.lerp(average, source, weight)


def compensated(average, second, source, weight):
    """`u = c + weight * ((s - a) - c)`, then `a' = a + u` and `c' = u + (a - a')`; `a + c` is the average.

    `c` is kept as a whole number of 2 ** -16 of the last bit of `a`.
    """
    if weight == 0.0:
        return average.clone(), second.clone()
    source = source.to(average.dtype)
    if weight == 1.0:
        return source.clone(), torch.zeros_like(second)
    if average.is_complex():
        pairs = compensated(torch.view_as_real(average), second, torch.view_as_real(source), weight)
        return torch.view_as_complex(pairs[0]), pairs[1]
    update = torch.lerp((second * last_bits(average) * 2.0**-16).float(), source - average, weight)
    new = average + update
    left = ((average - new) + update).double()
    # Of the very largest numbers nothing is kept, and the smallest are exact.
    is_kept = (new.abs() < 2.0**127) & (new.abs() >= 2.0**-126)
    units = torch.where(is_kept, left / last_bits(new) * 2.0**16, torch.where(new.isfinite(), 0.0, -32768.0))
    return new, units.round().clamp(-32768, 32767).to(torch.int16)


def last_bits(numbers):
    """The worth of the last bit of each float32; 0 for the very smallest."""
    exponents = torch.frexp(numbers.abs()).exponent.double()
    return torch.where(numbers.abs() >= 2.0**-110, 2.0 ** (exponents - 24), 0.0)


def mix64(z):
    """The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK_64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK_64
    return z ^ (z >> 31)


def step_key(seed, number):
    return mix64(mix64(seed) + number * GOLDEN & MASK_64)


def entry_key(name):
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def random_bits(step, entry, index):
    """32 bits for one element: the finalizer of MurmurHash3 (Appleby), with the second half of the key inside."""
    pair, is_odd = divmod(index, 2)
    key = mix64(step ^ entry ^ ((pair >> 32) * GOLDEN & MASK_64))
    x = (pair & MASK_32) ^ (key & MASK_32)
    x ^= x >> 16
    x = x * 0x85EBCA6B & MASK_32
    x ^= x >> 13
    x = x + (key >> 32) & MASK_32
    x = x * 0xC2B2AE35 & MASK_32
    x ^= x >> 16
    return (x & 0xFFFF) << 16 | x >> 16 if is_odd else x


def stochastic(average, source, weight, step, entry, first=0):
    """The new average of 16 bits; elements are counted in memory order, the first of them is number `first`."""
    if weight == 0.0:
        return average.clone()
    high, low = high_and_low(average.float(), source.to(torch.float32), weight)
    rounding = round_bfloat16 if average.dtype == torch.bfloat16 else round_float16
    rounded = average.clone()
    places = torch.arange(average.numel()).as_strided(average.shape, average.stride())
    for at in itertools.product(*map(range, average.shape)):
        random = random_bits(step, entry, first + int(places[at]))
        bits = rounding(float(high[at]), float(low[at]), random)
        rounded.view(torch.int16)[at] = bits - 2**16 if bits >= 2**15 else bits
    return rounded


def high_and_low(average, source, weight):
    """The new average in float32, and what its last rounding lost."""
    if weight == 1.0:
        return source.clone(), torch.zeros_like(source)
    weight = torch.tensor(weight, dtype=torch.float32)
    high = torch.lerp(average, source, weight)
    if weight < 0.5:
        return high, (source - average) * weight - (high - average)
    return high, (source - average) * (weight - 1) - (high - source)


def bits_of(number):
    """The bits of a float as float32."""
    return int(torch.tensor(number, dtype=torch.float32).view(torch.int32)) & MASK_32


def float32(number):
    """A float, rounded to float32."""
    return float(torch.tensor(number, dtype=torch.float32))


def is_negative(number):
    return math.copysign(1.0, number) < 0


def carry_of(fraction, random):
    """The whole part of a fraction of a last bit and the lower 16 random bits.

    What is more than about 100 last bits is noise, and as it comes out of float32.
    """
    total = bits_of(2.0**23 + 2**16 + fraction * 2.0**16 + (random & 0xFFFF))
    return (total - 2**32 if total >= 2**31 else total) // 2**16 - 0x4B01


def round_bfloat16(high, low, random):
    sign, magnitude = is_negative(high) << 15, bits_of(abs(high))
    if math.isnan(high):
        return 0x7FC0
    if magnitude >= 0x7E800000:
        return sign | magnitude >> 16
    outward = low * math.copysign(1.0, high)
    # Below a power of two the last bit is half of that above.
    exponent = magnitude - (outward < 0) >> 23
    carry = max(carry_of(float32(outward * 2.0 ** (149 - exponent)) * 2, random), -1)
    return sign | magnitude + carry + (random >> 16) >> 16


def round_float16(high, low, random):
    sign, size = is_negative(high) << 15, abs(high)
    if math.isnan(high):
        return 0x7E00
    if math.isinf(high):
        return sign | 0x7C00
    # The number in whole steps from zero; 2 ** 13 steps are a last bit of float16.
    kept = min(size, 65504.0)
    if kept < 2.0**-14:
        steps = round(kept * 2.0**37)
        outward = float32(low * math.copysign(1.0, high) + (size - steps * 2.0**-37))
        exponent = 113
    else:
        steps = bits_of(kept) - (112 << 23)
        outward = float32(low * math.copysign(1.0, high) + float32(size - kept))
        exponent = max(bits_of(kept) - (outward < 0) >> 23, 113)
    carry = carry_of(outward * 2.0 ** (150 - exponent), random)
    return sign | min(max((steps + carry) * 8 + (random >> 16) >> 16, 0), 0x7BFF)
