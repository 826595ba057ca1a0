"""The modes of an update, one tensor at a time, straight from their definitions.

Stochastic rounding. The random bits of an element are a function of four numbers and nothing else:

    key     = mix64(step ^ entry ^ (index >> 32) * GOLDEN)            step = mix64(mix64(seed) + number * GOLDEN)
    bits    = 32 bits, from index mod 2 ** 32, the lower half of the key, and its upper half

An average in 16 bits, `a`, and a source `s` give in float32 `high = lerp(a, s, weight)` and what that rounded away,
`low = weight * (s - a) - (high - a)`. Their sum lies between two numbers of 16 bits, and goes up with the probability
that leaves its mean where it is.
"""

import hashlib
import itertools

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
    key = mix64(step ^ entry ^ ((index >> 32) * GOLDEN & MASK_64))
    x = (index & MASK_32) ^ (key & MASK_32)
    x ^= x >> 16
    x = x * 0x85EBCA6B & MASK_32
    x ^= x >> 13
    x = x + (key >> 32) & MASK_32
    x = x * 0xC2B2AE35 & MASK_32
    return x ^ (x >> 16)


def stochastic(average, source, weight, step, entry, first=0):
    """The new average of 16 bits; elements are counted in memory order, the first of them is number `first`."""
    if weight == 0.0:
        return average.clone()
    a, s = average.float(), source.to(torch.float32)
    high = s.clone() if weight == 1.0 else torch.lerp(a, s, weight)
    low = torch.zeros_like(s) if weight == 1.0 else (s - a) * torch.tensor(weight, dtype=torch.float32) - (high - a)
    rounding = round_bfloat16 if average.dtype == torch.bfloat16 else round_float16
    rounded = average.clone()
    places = torch.arange(average.numel()).as_strided(average.shape, average.stride())
    for at in itertools.product(*map(range, average.shape)):
        random = random_bits(step, entry, first + int(places[at]))
        bits = rounding(bits_of(high[at]), float(low[at]), random)
        rounded.view(torch.int16)[at] = bits - 2**16 if bits >= 2**15 else bits
    return rounded


def bits_of(number):
    return int(number.view(torch.int32)) & MASK_32


def remainder_of(magnitude, low, negative, even=0):
    """What `low` is of the last bit of `high`, times 2 ** 16, towards zero; 0 where `high` is tiny.

    Below a power of two the last bit is half of that above, in float32 and in 16 bits, but for one power (`even`).
    """
    exponent = magnitude >> 23
    if exponent < 39:
        return 0
    outward = -low if negative else low
    if magnitude & 0x7FFFFF == 0 and outward < 0 and magnitude != even:
        exponent -= 1
    in_last_bits = outward * 2.0 ** (127 + 39 - exponent)
    return int(max(-65536.0, min(65536.0, in_last_bits)))


def round_bfloat16(bits, low, random):
    negative, magnitude = bits >> 31, bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return bits >> 16 | 0x40
    if magnitude < 0x7F800000:
        carry = (random & 0xFFFF) + remainder_of(magnitude, low, negative) >> 16
        magnitude = min(magnitude + (random >> 16) + carry, 0x7F7FFFFF)
    return negative << 15 | magnitude >> 16


def round_float16(bits, low, random):
    negative, magnitude = bits >> 31, bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return negative << 15 | 0x7E00
    if magnitude >= 0x38800000:
        if magnitude == 0x7F800000:
            return negative << 15 | 0x7C00
        carry = (random & 0xFFFF) + remainder_of(magnitude, low, negative, even=0x38800000) >> 16
        magnitude += (random >> 19) + carry
        return negative << 15 | min((magnitude >> 13) - (112 << 10), 0x7BFF)
    # Below 2 ** -14 they are multiples of 2 ** -24: 20 bits of a fraction, and 20 random bits.
    value = float(torch.tensor(magnitude, dtype=torch.int32).view(torch.float32))
    rest = max(-(2.0**20), min(2.0**20, (-low if negative else low) * 2.0**44))
    return negative << 15 | max(int(value * 2.0**44) + int(rest) + (random >> 12), 0) >> 20
