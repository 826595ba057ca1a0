"""Stochastic rounding to 16 bits: up or down at random, without bias, from random bits that can be repeated.

The random bits of an element are a function of four numbers: a seed, the number of the update, the tensor's key, and
the element's place in it. So there is no generator to save, and every kernel, rank and shard draws the same. Two
neighbours, at places 2 * pair and 2 * pair + 1, share one word of 32 bits, so that half as many words are drawn:

    step = mix64(mix64(seed) + number * GOLDEN)
    key  = mix64(step ^ tensor's key ^ (pair >> 32) * GOLDEN)
    word = mix32(pair, key), which mixes in the lower half of the key first and the upper half on the way
    bits = word at the even place, word with its halves swapped at the odd one

Each element has 32 uniform bits, and the upper halves of neighbours are independent. The lower half of an element
matters only if its upper half leaves the result open: with a probability of 2 ** -16.

An average `a` of 16 bits and a source `s` give `high = lerp(a, s, weight)` in float32, and what that rounded away:

    low = factor * (s - a) - (high - base)    with base = a, factor = weight        for weight < 1/2
                                              with base = s, factor = weight - 1    from there on

Without `low` an average would get no nearer to its source than one in float32. The result is one of the two numbers
of 16 bits around `high + low`. For bfloat16, with the bits of `high` as an integer:

    carry  = floor(fraction + lower half / 2 ** 16), at least -1
    result = (bits of high + carry + upper half) >> 16

`fraction` is `low` in units of the last bit that `high` has in float32, positive if it points away from zero. If it
points to zero from a power of two, that unit is half as large. The sum in `carry` has 16 bits after the point, rounded
to nearest, ties to even. For float16 the shift is 13, and only 13 bits of the upper half count; numbers below 2 ** -14
are first rounded to multiples of 2 ** -37, and `low` takes over the difference.

Finite numbers stay finite: float16 saturates at 65504, and bfloat16 truncates numbers from 2 ** 126 on. Nothing
crosses zero: if `high` is zero, the exact average is at most 2 ** -150 in size. The product then rounds to `-base` or
to the next number on the average's side, and `low` is zero or has the sign of `high`.

Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014 (mix64); Appleby, MurmurHash3, 2011
(mix32); Connolly, Higham and Mary, Stochastic rounding and its probabilistic backward error analysis, 2021.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .pieces import Batch

GOLDEN = 0x9E3779B97F4A7C15
DRAW = 2  # the version of the random bits; states hold it, because under another one they could not resume bit for bit
_MASK_64 = (1 << 64) - 1
_MASK_32 = (1 << 32) - 1
_MAGNITUDE = 0x7FFFFFFF
_EXPONENT = 0x7F800000
_SIGN_AND_EXPONENT = -0x00800000
# The bits of some numbers as float32.
_OFFSET = 0x4B010000  # 2 ** 23 + 2 ** 16
_CUT_FROM_BFLOAT16 = 0x7E800000  # 2 ** 126
_LARGEST_FLOAT16 = 0x477FE000  # 65504
_NORMAL_FLOAT16 = 0x38800000  # 2 ** -14, from where on float16 has its full precision


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


def segment_key(step: int, key: int, pair: int) -> tuple[int, int]:
    """The halves of the key of a segment, the lower one first: its pairs share the upper 32 bits of this one."""
    mixed = mix64(step ^ key ^ ((pair >> 32) * GOLDEN & _MASK_64))
    return mixed & _MASK_32, mixed >> 32


def random_bits(pairs: Tensor, first_halves: Tensor, second_halves: Tensor) -> Tensor:
    """The word of each pair, 32 random bits as int64.

    Args:
        pairs: int64, the lower 32 bits; overwritten.
        first_halves: int64, the lower half of the key for each pair.
        second_halves: int64, the upper half.
    """
    x = pairs.bitwise_xor_(first_halves)
    x.bitwise_xor_(x >> 16).mul_(0x85EBCA6B).bitwise_and_(_MASK_32)
    x.bitwise_xor_(x >> 13).add_(second_halves).bitwise_and_(_MASK_32)
    x.mul_(0xC2B2AE35).bitwise_and_(_MASK_32)
    return x.bitwise_xor_(x >> 16)


def swap_halves(words: Tensor) -> Tensor:
    """Words of 32 bits, as int64, with their halves swapped."""
    return (words >> 16) | ((words & 0xFFFF) << 16)


def draw(batch: Batch, origins: Sequence[tuple[int, int]], step: int) -> Tensor:
    """32 random bits for each element of a batch, as int64.

    Places are counted in the memory of the averages, so that their layout decides and not how they were cut.

    Args:
        batch: its second column holds pieces of the first averages of the rows.
        origins: for each row its key, and the place of the first element of its first average's memory.
        step: the key of the update.
    """
    places: list[Tensor] = []
    halves: list[Tensor] = []
    for piece, number in zip(batch.columns[1], batch.rows, strict=True):
        tensor, origin = origins[number]
        here = _offsets(piece).add_(origin + piece.storage_offset())
        segments = here >> 33
        lowest, highest = int(segments.min()), int(segments.max())
        keys = [segment_key(step, tensor, segment << 32) for segment in range(lowest, highest + 1)]
        key = torch.tensor(keys, dtype=torch.int64, device=piece.device)
        halves.append(key.expand(len(here), 2) if len(key) == 1 else key[segments - lowest])
        places.append(here)
    first_halves, second_halves = torch.cat(halves).unbind(1)
    place = torch.cat(places)
    words = random_bits((place >> 1).bitwise_and_(_MASK_32), first_halves, second_halves)
    return torch.where(place & 1 == 1, swap_halves(words), words)


def _offsets(piece: Tensor) -> Tensor:
    """How far each element is from the first, in elements of memory, in the order of the shape."""
    offsets = torch.zeros(1, dtype=torch.int64, device=piece.device)
    for size, stride in zip(piece.shape, piece.stride(), strict=True):
        offsets = (offsets.unsqueeze(-1) + torch.arange(size, device=piece.device) * stride).flatten()
    return offsets


def round_stochastically(high: Tensor, low: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """`high + low` in bfloat16 or float16.

    Args:
        high: float32.
        low: float32, what the rounding to `high` lost.
        random: int64, 32 bits for each.
        dtype: torch.bfloat16 or torch.float16.
    """
    upper, lower = (random >> 16).to(torch.int32), (random & 0xFFFF).to(torch.int32)
    if dtype == torch.bfloat16:
        return _round_bfloat16(high, low, upper, lower)
    return _round_float16(high, low, upper, lower)


def _round_bfloat16(high: Tensor, low: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    bits = high.view(torch.int32)
    # One less if `low` points to zero, which from a power of two leads to the next lower exponent.
    inner = bits + ((bits ^ low.view(torch.int32)) >> 31)
    # With its sign, 2 ** (126 - e) for the biased exponent e. Times 2 ** 23 it is half the inverse of a last bit.
    power = ((253 << 23) - (inner & _SIGN_AND_EXPONENT)).view(torch.float32)
    rounded = bits + upper + _carry(low * 2.0**23 * power, lower).clamp_(min=-1)
    found = torch.where(bits & _MAGNITUDE < _CUT_FROM_BFLOAT16, rounded, bits)
    return (found >> 16).to(torch.int16).view(torch.bfloat16)


def _round_float16(high: Tensor, low: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    bits = high.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    kept = magnitude.clamp(max=_LARGEST_FLOAT16)
    # Below 2 ** -14 float16 has the last bit of 2 ** -14. Beside that number, float32 has 13 bits more.
    is_small = kept < _NORMAL_FLOAT16
    room = torch.where(is_small, 2.0**-14, 0.0)
    wide = kept.view(torch.float32) + room
    outward = torch.where(bits < 0, -low, low) + (magnitude.view(torch.float32) - (wide - room))
    wide_bits = wide.view(torch.int32)
    inner = (wide_bits + (outward.view(torch.int32) >> 31)) & _EXPONENT
    exponent = inner.clamp_(min=_NORMAL_FLOAT16).masked_fill_(is_small, _NORMAL_FLOAT16)
    # Half the inverse of a last bit, by its bits, modulo 2 ** 32.
    power = ((276 << 23) - (1 << 32) - exponent).view(torch.float32)
    steps = wide_bits - torch.where(is_small, 113 << 23, 112 << 23) + _carry(outward * power, lower)
    rounded = (steps * 8 + upper >> 16).clamp_(0, 0x7BFF)
    special = torch.where(magnitude > _EXPONENT, 0x7E00, 0x7C00)
    found = torch.where(magnitude < _EXPONENT, rounded, special) | (bits >> 16 & 0x8000)
    return found.to(torch.int16).view(torch.float16)


def _carry(half: Tensor, lower: Tensor) -> Tensor:
    """How many last bits of float32 are carried.

    Args:
        half: half the fraction of a last bit that is to be added.
        lower: int32, the lower half of the random bits.
    """
    # From 2 ** 23 on float32 has whole numbers only: its lowest bits are the number's.
    total = (lower | _OFFSET).view(torch.float32) + half * 2.0**17
    return (total.view(torch.int32) >> 16) - (_OFFSET >> 16)
