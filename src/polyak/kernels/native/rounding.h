/* Stochastic rounding to 16 bits: the arithmetic of rounding.py, two neighbours at a time.
 *
 * Two neighbours take their 32 random bits from one word: the even one as it is, the odd one with its halves swapped.
 */
#ifndef POLYAK_ROUNDING_H
#define POLYAK_ROUNDING_H

#include "common.h"

/* Two numbers of 16 bits are read and written as one of 32 bits. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even one of two neighbours is the lower half");

INLINE uint64_t mix64(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

INLINE uint64_t segment_key(uint64_t step, uint64_t key, uint64_t pair)
{
    return mix64(step ^ key ^ (pair >> 32) * 0x9E3779B97F4A7C15u);
}

INLINE uint32_t random_bits(uint32_t pair, uint64_t key)
{
    uint32_t x = pair ^ (uint32_t)key;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = ((x ^ (x >> 13)) + (uint32_t)(key >> 32)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

/* The new average is `high + low`: `high` is what torch.lerp gives, and `low` what its rounding to float32 lost. */
typedef struct {
    float high, low;
} Sum;

typedef enum { BELOW_HALF, FROM_HALF, COPY } Way; /* the ranges of weights */

INLINE Sum moved(float average, float source, float weight, Way way)
{
    if (way == COPY) /* a NaN with bits in its lower half only would be truncated to an infinity */
        return (Sum){source == source ? source : NAN, 0.0f};
    const float difference = source - average;
    const float base = way == BELOW_HALF ? average : source;
    const float factor = way == BELOW_HALF ? weight : weight - 1.0f;
    const float high = fmaf(difference, factor, base);
    return (Sum){high, difference * factor - (high - base)};
}

/* The bits of 2 ** 23 + 2 ** 16. From 2 ** 23 on float32 has whole numbers only: its lowest bits are the number's. */
#define OFFSET 0x4B010000u
#define CARRIED (OFFSET >> 16)

/* The carry, in last bits of float32, plus CARRIED. `half` is half the fraction of a last bit that is to be added. */
INLINE int32_t carry(float half, uint32_t lower)
{
    return (int32_t)bits_of(fmaf(half, 0x1p17f, float_of(OFFSET | lower))) >> 16;
}

/* The bits of some numbers as float32. */
#define CUT_FROM_BFLOAT16 0x7E800000u /* 2 ** 126 */
#define LARGEST_FLOAT16 0x477FE000u   /* 65504 */
#define NORMAL_FLOAT16 0x38800000u    /* 2 ** -14, from where on float16 has its full precision */

/* Each of these leaves the number in the upper 16 bits. */

INLINE uint32_t round_bfloat16(Sum sum, uint32_t upper, uint32_t lower)
{
    const uint32_t bits = bits_of(sum.high);
    const uint32_t inner = bits + (uint32_t)((int32_t)(bits ^ bits_of(sum.low)) >> 31);
    /* With its sign, 2 ** (126 - e) for the biased exponent e. Times 2 ** 23 it is half the inverse of a last bit. */
    const float power = float_of((253u << 23) - (inner & 0xFF800000u));
    const int32_t carried = carry(sum.low * 0x1p23f * power, lower), least = CARRIED - 1;
    const uint32_t rounded = bits - CARRIED + upper + (uint32_t)(carried > least ? carried : least);
    return (bits & 0x7FFFFFFFu) < CUT_FROM_BFLOAT16 ? rounded : bits;
}

INLINE uint32_t round_float16(Sum sum, uint32_t upper, uint32_t lower)
{
    const uint32_t bits = bits_of(sum.high), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    const uint32_t kept = magnitude < LARGEST_FLOAT16 ? magnitude : LARGEST_FLOAT16;
    /* Below 2 ** -14 float16 has the last bit of 2 ** -14. Beside that number, float32 has 13 bits more. */
    const uint32_t is_small = kept < NORMAL_FLOAT16 ? ~0u : 0u, room = is_small & NORMAL_FLOAT16;
    const float wide = float_of(kept) + float_of(room), lost = float_of(magnitude) - (wide - float_of(room));
    const float outward = float_of(bits_of(sum.low) ^ sign) + lost;
    const uint32_t inner = bits_of(wide) + (uint32_t)((int32_t)(bits_of(outward) | is_small) >> 31);
    const uint32_t exponent = inner & 0x7F800000u;
    const float power = float_of((276u << 23) - (exponent > NORMAL_FLOAT16 ? exponent : NORMAL_FLOAT16));
    /* The number in units of its last bit: zero has the exponent 112, or 113 beside `room`. */
    const uint32_t whole = bits_of(wide) - (room & 0x800000u) - (112u << 23);
    int32_t rounded = (int32_t)((whole - CARRIED + (uint32_t)carry(outward * power, lower)) * 8u + upper);
    rounded = rounded > 0 ? rounded : 0;
    rounded = rounded < 0x7BFF0000 ? rounded : 0x7BFF0000;
    return (magnitude < 0x7F800000u ? (uint32_t)rounded : bits << 3 & 0x7FFFFFFFu) | sign;
}

/* Two neighbours of each dtype, as float32. */
typedef struct {
    float even, odd;
} Two;

INLINE uint32_t bits_of_two(const uint16_t *pair)
{
    uint32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return bits;
}

INLINE Two two_bfloat16(const uint16_t *pair)
{
    const uint32_t bits = bits_of_two(pair);
    return (Two){float_of(bits << 16), float_of(bits & 0xFFFF0000u)};
}

INLINE Two two_float16(const uint16_t *pair)
{
    const uint32_t bits = bits_of_two(pair);
    return (Two){from_float16(bits & 0xFFFFu), from_float16(bits >> 16)};
}

INLINE float from_float64(double value) { return (float)value; }

INLINE Two two_float32(const float *pair) { return (Two){pair[0], pair[1]}; }
INLINE Two two_float64(const double *pair) { return (Two){(float)pair[0], (float)pair[1]}; }

#endif
