"""Stochastic rounding to 16 bits: up or down by chance, so that the mean is right, by chances that can be repeated.

The random bits of an element are a function of four numbers: a seed, the number of the update, the tensor's key, and
the element's place in it. So there is no generator to save, and every kernel, rank and shard draws the same.

    step = mix64(mix64(seed) + number * GOLDEN)
    key  = mix64(step ^ tensor's key ^ (place >> 32) * GOLDEN)
    bits = mix32(place, key), where the lower half of the key is mixed in first and the upper half on the way

An average `a` of 16 bits and a source `s` give in float32 `high = lerp(a, s, weight)` and what that rounded away,
`low = weight * (s - a) - (high - a)`, without which an average would stop as near to its source as one in float32.
`high + low` goes to the next number of 16 bits above or below it in magnitude, with 32 bits of probability. What is
finite stays so: beyond the largest number it is the largest.

Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014 (mix64); Appleby, MurmurHash3, 2011
(mix32); Connolly, Higham and Mary, Stochastic rounding and its probabilistic backward error analysis, 2021.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1
_MASK_32 = (1 << 32) - 1
_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_SMALLEST_NORMAL = 0x38800000  # 2 ** -14, the smallest normal number of float16, as float32


def step_key(seed: int, number: int) -> int:
    """64 bits that stand for one update."""
    return mix64((mix64(seed & _MASK_64) + number * GOLDEN) & _MASK_64)


def tensor_key(name: str) -> int:
    """64 bits that stand for the tensor of a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def mix64(z: int) -> int:
    """The finalizer of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK_64
    return z ^ (z >> 31)


def part_key(step: int, key: int, place: int) -> tuple[int, int]:
    """The two halves of the key for places that have the upper 32 bits of this one, the lower half first."""
    mixed = mix64(step ^ key ^ ((place >> 32) * GOLDEN & _MASK_64))
    return mixed & _MASK_32, mixed >> 32


def random_bits(places: Tensor, first_halves: Tensor, second_halves: Tensor) -> Tensor:
    """32 random bits for each place, as int64.

    Args:
        places: int64, the lower 32 bits; overwritten.
        first_halves: int64, the lower half of the key for each place.
        second_halves: int64, the upper half.
    """
    x = places.bitwise_xor_(first_halves)
    x.bitwise_xor_(x >> 16).mul_(0x85EBCA6B).bitwise_and_(_MASK_32)
    x.bitwise_xor_(x >> 13).add_(second_halves).bitwise_and_(_MASK_32)
    x.mul_(0xC2B2AE35).bitwise_and_(_MASK_32)
    return x.bitwise_xor_(x >> 16)


def round_stochastically(high: Tensor, low: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """`high + low` in bfloat16 or float16.

    Args:
        high: float32.
        low: float32, at most about the last bit of `high`.
        random: int64, 32 bits for each.
        dtype: torch.bfloat16 or torch.float16.
    """
    words = high.view(torch.int32).to(torch.int64)
    magnitude = words & _MAGNITUDE
    outward = torch.where(words < 0, -low, low)
    even = 0 if dtype == torch.bfloat16 else _SMALLEST_NORMAL
    carried = magnitude + _carry(magnitude, outward, random, even)
    if dtype == torch.bfloat16:
        finite = carried.add_(random >> 16).bitwise_right_shift_(16).clamp_(max=0x7F7F)
        special = (magnitude >> 16) | torch.where(magnitude > _INFINITY, 0x40, 0)
    else:
        finite = carried.add_(random >> 19).bitwise_right_shift_(13).sub_(112 << 10).clamp_(max=0x7BFF)
        finite = torch.where(magnitude < _SMALLEST_NORMAL, _subnormal(high.abs(), outward, random), finite)
        special = torch.where(magnitude > _INFINITY, 0x7E00, 0x7C00)
    bits = torch.where(magnitude < _INFINITY, finite, special) | ((words < 0).to(torch.int64) << 15)
    return bits.to(torch.int16).view(dtype)


def _carry(magnitude: Tensor, outward: Tensor, random: Tensor, even: int) -> Tensor:
    """-1, 0 or 1 last bits of float32: the fraction of one that `outward` is, and 16 random bits.

    Below a power of two a last bit is worth half, unless 16 bits have one worth there: `even` is that power, or 0.
    """
    is_power = (magnitude & 0x7FFFFF == 0).logical_and_(magnitude != even)
    outward = torch.where(is_power.logical_and_(outward < 0), outward + outward, outward)
    exponent = magnitude >> 23
    scale = ((293 - exponent).clamp_(max=254) << 23).to(torch.int32).view(torch.float32)
    last_bits = (outward * scale).clamp_(-65536.0, 65536.0).nan_to_num_().to(torch.int64)
    last_bits.masked_fill_(exponent < 39, 0)
    return last_bits.add_(random & 0xFFFF).bitwise_right_shift_(16)


def _subnormal(magnitude: Tensor, outward: Tensor, random: Tensor) -> Tensor:
    """Multiples of 2 ** -24, from 20 bits of a fraction."""
    small = magnitude.clamp(max=2.0**-14).nan_to_num_()
    fixed = (small * 2.0**44).to(torch.int64)
    rest = (outward * 2.0**44).clamp_(-(2.0**20), 2.0**20).nan_to_num_().to(torch.int64)
    return fixed.add_(rest).add_(random >> 12).clamp_(min=0).bitwise_right_shift_(20)
