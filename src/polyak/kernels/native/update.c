/* The update of many averages in one pass over their sources, rounded in one of three ways.
 *
 *     lerp(a, s) = fma(weight, s - a, a)               for weight < 1/2
 *                  fma(-(s - a), 1 - weight, s)        from there on
 *
 * This is the arithmetic of torch.lerp, bit for bit. A weight of 1 copies and a weight of 0 leaves, whatever the values
 * are.
 *
 *     plain          a' = lerp(a, s)
 *     compensated    u = lerp(c, s - a),  a' = a + u,  c' = (a - a') + u         a + c is the average
 *     stochastic     a' = lerp(a, s), up or down to 16 bits by chance; see rounding.py
 *
 * A table has one row for each chunk: source, count, number of the first element, key of its tensor; then the average
 * of each profile, and then the second term of each.
 */
#include "common.h"

#define COLUMNS 4

/* What one call is given, in one structure: Python hands over one argument several times as fast as six. */
typedef struct {
    Work work;
    const int64_t *table;
    int64_t num_profiles;
    const double *weights;
    uint64_t step;
    int64_t nanoseconds; /* that the call took, if it had several threads */
} Update;

/* All updates go through the table in the same way; LOOP is what is done with the row of one chunk and a profile. */
#define DEFINE_UPDATE(NAME, WIDTH, LOOP)                                                                               \
    INLINE void NAME##_chunk(const Update *update, int64_t chunk)                                                      \
    {                                                                                                                  \
        const int64_t num_profiles = update->num_profiles;                                                             \
        const int64_t *row = update->table + chunk * (COLUMNS + (WIDTH) * num_profiles);                               \
        const double *weights = update->weights;                                                                       \
        const uint64_t step = update->step;                                                                            \
        (void)step;                                                                                                    \
        for (int64_t profile = 0; profile < num_profiles; profile++)                                                   \
            if (weights[profile] != 0.0) {                                                                             \
                const int64_t *average = row + COLUMNS + profile;                                                      \
                LOOP;                                                                                                  \
            }                                                                                                          \
    }                                                                                                                  \
    EXPORT void polyak_##NAME(Update *update)                                                                          \
    {                                                                                                                  \
        const int64_t started = update->work.num_threads > 1 ? nanoseconds() : 0;                                      \
        FOR_EACH_CHUNK(&update->work, NAME##_chunk(update, chunk))                                                     \
        update->nanoseconds = update->work.num_threads > 1 ? nanoseconds() - started : 0;                              \
    }

/* Plain. */

#define DEFINE_LERP(NAME, SOURCE, AVERAGE, LOAD, FMA)                                                                  \
    INLINE void NAME##_body(const SOURCE *restrict source, AVERAGE *restrict average, int64_t count, double weight)    \
    {                                                                                                                  \
        const AVERAGE w = (AVERAGE)weight, rest = (AVERAGE)1 - w;                                                      \
        if (weight == 1.0) {                                                                                           \
            for (int64_t i = 0; i < count; i++)                                                                        \
                average[i] = (AVERAGE)LOAD(source[i]);                                                                 \
        } else if (w < (AVERAGE)0.5) {                                                                                 \
            for (int64_t i = 0; i < count; i++) {                                                                      \
                const AVERAGE s = (AVERAGE)LOAD(source[i]), a = average[i];                                            \
                average[i] = FMA(w, s - a, a);                                                                         \
            }                                                                                                          \
        } else {                                                                                                       \
            for (int64_t i = 0; i < count; i++) {                                                                      \
                const AVERAGE s = (AVERAGE)LOAD(source[i]), a = average[i];                                            \
                average[i] = FMA(-(s - a), rest, s);                                                                   \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    VERSIONS(NAME##_loop, NAME##_body,                                                                                 \
             (const SOURCE *restrict source, AVERAGE *restrict average, int64_t count, double weight),                 \
             (source, average, count, weight))                                                                         \
    DEFINE_UPDATE(NAME, 1,                                                                                             \
                  NAME##_loop(POINTER(const SOURCE, row[0]), POINTER(AVERAGE, *average), row[1], weights[profile]))

DEFINE_LERP(lerp_float32_float32, float, float, from_float32, fmaf)
DEFINE_LERP(lerp_float64_float32, double, float, , fmaf)
DEFINE_LERP(lerp_float16_float32, uint16_t, float, from_float16, fmaf)
DEFINE_LERP(lerp_bfloat16_float32, uint16_t, float, from_bfloat16, fmaf)
DEFINE_LERP(lerp_float32_float64, float, double, , fma)
DEFINE_LERP(lerp_float64_float64, double, double, , fma)
DEFINE_LERP(lerp_float16_float64, uint16_t, double, from_float16, fma)
DEFINE_LERP(lerp_bfloat16_float64, uint16_t, double, from_bfloat16, fma)

INLINE float lerp(float average, float source, float weight)
{
    const float difference = source - average;
    return weight < 0.5f ? fmaf(weight, difference, average) : fmaf(-difference, 1.0f - weight, source);
}

/* Compensated; see fractions.py. The bits of an exponent alone are a power of two, and less than those of 2 ** 127 its
 * inverse. Beside 3 * 2 ** 22 there is no room for a fraction, and the lowest bits are those of a whole number. */

INLINE float from_fraction(int16_t second, float first)
{
    return (float)second * (float_of(bits_of(first) & 0x7F800000u) * 0x1p-39f);
}

INLINE int16_t to_fraction(float number, float first)
{
    float part = number * float_of(0x7F000000u - (bits_of(first) & 0x7F800000u));
    part = part > -0x1p-24f ? part : -0x1p-24f;
    part = part < 0x1.fffcp-25f ? part : 0x1.fffcp-25f;
    return (int16_t)bits_of(part * 0x1p39f + 0x1.8p23f);
}

#define DEFINE_COMPENSATED(NAME, SOURCE, LOAD)                                                                         \
    INLINE void NAME##_body(const SOURCE *restrict source, float *restrict average, int16_t *restrict second,         \
                            int64_t count, double weight)                                                              \
    {                                                                                                                  \
        const float w = (float)weight;                                                                                 \
        if (weight == 1.0) {                                                                                           \
            for (int64_t i = 0; i < count; i++) {                                                                      \
                average[i] = (float)LOAD(source[i]);                                                                   \
                second[i] = 0;                                                                                         \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        for (int64_t i = 0; i < count; i++) {                                                                          \
            const float a = average[i];                                                                                \
            const float update = lerp(from_fraction(second[i], a), (float)LOAD(source[i]) - a, w);                        \
            const float new = a + update;                                                                              \
            average[i] = new;                                                                                          \
            second[i] = to_fraction((a - new) + update, new);                                                               \
        }                                                                                                              \
    }                                                                                                                  \
    VERSIONS(NAME##_loop, NAME##_body,                                                                                 \
             (const SOURCE *restrict source, float *restrict average, int16_t *restrict second, int64_t count,        \
              double weight),                                                                                          \
             (source, average, second, count, weight))                                                                 \
    DEFINE_UPDATE(NAME, 2,                                                                                             \
                  NAME##_loop(POINTER(const SOURCE, row[0]), POINTER(float, *average),                                 \
                              POINTER(int16_t, average[num_profiles]), row[1], weights[profile]))

DEFINE_COMPENSATED(compensated_float32, float, from_float32)
DEFINE_COMPENSATED(compensated_float64, double, )
DEFINE_COMPENSATED(compensated_float16, uint16_t, from_float16)
DEFINE_COMPENSATED(compensated_bfloat16, uint16_t, from_bfloat16)

/* Stochastic. */

INLINE uint64_t mix64(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

INLINE uint32_t random_bits(uint32_t place, uint32_t first_half, uint32_t second_half)
{
    uint32_t x = place ^ first_half;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = ((x ^ (x >> 13)) + second_half) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

INLINE float clamp(float number, float bound)
{
    number = number < -bound ? -bound : number;
    return number > bound ? bound : number;
}

/* -1, 0 or 1 last bits of float32: the fraction of one that `outward` is, and 16 random bits. Below a power of two a last
 * bit is worth half, unless 16 bits have one worth there (`even` is that power, or 0). */
INLINE int32_t carry(uint32_t magnitude, float outward, uint32_t random, uint32_t even)
{
    const int32_t exponent = (int32_t)(magnitude >> 23);
    const float scale = float_of((uint32_t)(exponent < 39 ? 0 : 293 - exponent) << 23);
    const int is_power = (magnitude & 0x7FFFFFu) == 0 && magnitude != even;
    const float worth = is_power && outward < 0.0f ? outward + outward : outward;
    return ((int32_t)clamp(worth * scale, 65536.0f) + (int32_t)(random & 0xFFFFu)) >> 16;
}

INLINE uint16_t round_bfloat16(float high, float low, uint32_t random)
{
    const uint32_t bits = bits_of(high), magnitude = bits & 0x7FFFFFFFu, sign = bits & 0x80000000u;
    const float outward = float_of(bits_of(low) ^ sign);
    const uint32_t carried = magnitude + (random >> 16) + (uint32_t)carry(magnitude, outward, random, 0);
    const uint32_t finite = carried < 0x7F7FFFFFu ? carried : 0x7F7FFFFFu;
    const uint32_t special = magnitude > 0x7F800000u ? magnitude | 0x400000u : magnitude;
    return (uint16_t)(((magnitude < 0x7F800000u ? finite : special) | sign) >> 16);
}

INLINE uint16_t round_float16(float high, float low, uint32_t random)
{
    const uint32_t bits = bits_of(high), magnitude = bits & 0x7FFFFFFFu, sign = bits & 0x80000000u;
    const float outward = float_of(bits_of(low) ^ sign);
    const uint32_t carried = magnitude + (random >> 19) + (uint32_t)carry(magnitude, outward, random, 0x38800000u);
    const uint32_t shifted = (carried >> 13) - (112u << 10);
    const uint32_t normal = shifted < 0x7BFFu ? shifted : 0x7BFFu;
    /* Below 2 ** -14 they are multiples of 2 ** -24: 20 bits of a fraction, and 20 random bits. */
    const int32_t fixed = (int32_t)(float_of(magnitude < 0x38800000u ? magnitude : 0u) * 0x1p44f) +
                          (int32_t)clamp(outward * 0x1p44f, 0x1p20f) + (int32_t)(random >> 12);
    const uint32_t subnormal = (uint32_t)(fixed < 0 ? 0 : fixed) >> 20;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return (uint16_t)((magnitude < 0x7F800000u ? finite : special) | sign >> 16);
}

#define DEFINE_STOCHASTIC(NAME, SOURCE, LOAD, FROM, ROUND)                                                             \
    INLINE void NAME##_body(const SOURCE *restrict source, uint16_t *restrict average, int64_t count, uint32_t first,  \
                            uint64_t key, double weight)                                                               \
    {                                                                                                                  \
        const float w = (float)weight;                                                                                 \
        const uint32_t first_half = (uint32_t)key, second_half = (uint32_t)(key >> 32);                                \
        if (weight == 1.0) {                                                                                           \
            for (int64_t i = 0; i < count; i++)                                                                        \
                average[i] = ROUND((float)LOAD(source[i]), 0.0f,                                                       \
                                   random_bits(first + (uint32_t)i, first_half, second_half));                         \
            return;                                                                                                    \
        }                                                                                                              \
        for (int64_t i = 0; i < count; i++) {                                                                          \
            const float a = FROM(average[i]), s = (float)LOAD(source[i]);                                              \
            const float high = lerp(a, s, w), low = (s - a) * w - (high - a);                                          \
            average[i] = ROUND(high, low, random_bits(first + (uint32_t)i, first_half, second_half));                  \
        }                                                                                                              \
    }                                                                                                                  \
    VERSIONS(NAME##_loop, NAME##_body,                                                                                 \
             (const SOURCE *restrict source, uint16_t *restrict average, int64_t count, uint32_t first, uint64_t key,  \
              double weight),                                                                                          \
             (source, average, count, first, key, weight))                                                             \
    DEFINE_UPDATE(NAME, 1,                                                                                             \
                  NAME##_loop(POINTER(const SOURCE, row[0]), POINTER(uint16_t, *average), row[1], (uint32_t)row[2],    \
                              mix64(step ^ (uint64_t)row[3] ^ ((uint64_t)row[2] >> 32) * 0x9E3779B97F4A7C15u),         \
                              weights[profile]))

DEFINE_STOCHASTIC(stochastic_float32_bfloat16, float, from_float32, from_bfloat16, round_bfloat16)
DEFINE_STOCHASTIC(stochastic_float64_bfloat16, double, , from_bfloat16, round_bfloat16)
DEFINE_STOCHASTIC(stochastic_float16_bfloat16, uint16_t, from_float16, from_bfloat16, round_bfloat16)
DEFINE_STOCHASTIC(stochastic_bfloat16_bfloat16, uint16_t, from_bfloat16, from_bfloat16, round_bfloat16)
DEFINE_STOCHASTIC(stochastic_float32_float16, float, from_float32, from_float16, round_float16)
DEFINE_STOCHASTIC(stochastic_float64_float16, double, , from_float16, round_float16)
DEFINE_STOCHASTIC(stochastic_float16_float16, uint16_t, from_float16, from_float16, round_float16)
DEFINE_STOCHASTIC(stochastic_bfloat16_float16, uint16_t, from_bfloat16, from_float16, round_float16)
