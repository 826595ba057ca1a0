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
#include "rounding.h"

#define COLUMNS 4

/* The arguments of one call, in one structure: Python passes one argument several times as fast as six. */
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

#define DEFINE_PLAIN(NAME, SOURCE, AVERAGE, LOAD, FMA)                                                                 \
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

DEFINE_PLAIN(plain_float32_float32, float, float, from_float32, fmaf)
DEFINE_PLAIN(plain_float64_float32, double, float, , fmaf)
DEFINE_PLAIN(plain_float16_float32, uint16_t, float, from_float16, fmaf)
DEFINE_PLAIN(plain_bfloat16_float32, uint16_t, float, from_bfloat16, fmaf)
DEFINE_PLAIN(plain_float32_float64, float, double, , fma)
DEFINE_PLAIN(plain_float64_float64, double, double, , fma)
DEFINE_PLAIN(plain_float16_float64, uint16_t, double, from_float16, fma)
DEFINE_PLAIN(plain_bfloat16_float64, uint16_t, double, from_bfloat16, fma)

INLINE float lerp(float average, float source, float weight)
{
    const float difference = source - average;
    return weight < 0.5f ? fmaf(weight, difference, average) : fmaf(-difference, 1.0f - weight, source);
}

/* Compensated; see modes/compensated.py. The bits of an exponent alone are a power of two, and less than those of 2 ** 127 its
 * inverse. Beside 3 * 2 ** 22 there is no room for a fraction, and the lowest bits are those of a whole number. */

INLINE float from_fraction(int16_t second, float first)
{
    return (float)second * (float_of(bits_of(first) & 0x7F800000u) * 0x1p-39f);
}

INLINE int16_t to_fraction(float number, float first)
{
    float scaled = number * float_of(0x7F000000u - (bits_of(first) & 0x7F800000u));
    scaled = scaled > -0x1p-24f ? scaled : -0x1p-24f;
    scaled = scaled < 0x1.fffcp-25f ? scaled : 0x1.fffcp-25f;
    return (int16_t)bits_of(scaled * 0x1p39f + 0x1.8p23f);
}

#define DEFINE_COMPENSATED(NAME, SOURCE, LOAD)                                                                         \
    INLINE void NAME##_body(const SOURCE *restrict source, float *restrict average, int16_t *restrict second,          \
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
            const float update = lerp(from_fraction(second[i], a), (float)LOAD(source[i]) - a, w);                     \
            const float new = a + update;                                                                              \
            average[i] = new;                                                                                          \
            second[i] = to_fraction((a - new) + update, new);                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    VERSIONS(NAME##_loop, NAME##_body,                                                                                 \
             (const SOURCE *restrict source, float *restrict average, int16_t *restrict second, int64_t count,         \
              double weight),                                                                                          \
             (source, average, second, count, weight))                                                                 \
    DEFINE_UPDATE(NAME, 2,                                                                                             \
                  NAME##_loop(POINTER(const SOURCE, row[0]), POINTER(float, *average),                                 \
                              POINTER(int16_t, average[num_profiles]), row[1], weights[profile]))

DEFINE_COMPENSATED(compensated_float32_float32, float, from_float32)
DEFINE_COMPENSATED(compensated_float64_float32, double, )
DEFINE_COMPENSATED(compensated_float16_float32, uint16_t, from_float16)
DEFINE_COMPENSATED(compensated_bfloat16_float32, uint16_t, from_bfloat16)

/* Stochastic. */

#define DEFINE_STOCHASTIC(NAME, SOURCE, SOURCE_TYPE, AVERAGE)                                                          \
    INLINE void NAME##_one(const SOURCE_TYPE *source, uint16_t *average, uint64_t place, uint64_t key, float weight,   \
                           Way way)                                                                                    \
    {                                                                                                                  \
        const uint32_t word = random_bits((uint32_t)(place >> 1), key), upper = word >> 16, lower = word & 0xFFFFu;    \
        const Sum sum = moved(from_##AVERAGE(*average), from_##SOURCE(*source), weight, way);                          \
        *average = (uint16_t)(round_##AVERAGE(sum, place & 1 ? lower : upper, place & 1 ? upper : lower) >> 16);       \
    }                                                                                                                  \
    INLINE void NAME##_way(const SOURCE_TYPE *restrict source, uint16_t *restrict average, int64_t count,              \
                           uint64_t first, uint64_t key, float weight, Way way)                                        \
    {                                                                                                                  \
        const int64_t head = first & 1, num_pairs = (count - head) / 2, tail = head + 2 * num_pairs;                   \
        const SOURCE_TYPE *sources = source + head;                                                                    \
        uint16_t *averages = average + head;                                                                           \
        uint32_t pair = (uint32_t)((first + 1) >> 1);                                                                  \
        for (int64_t i = 0; i < num_pairs; i++, pair++) {                                                              \
            const uint32_t word = random_bits(pair, key), upper = word >> 16, lower = word & 0xFFFFu;                  \
            const Two s = two_##SOURCE(sources + 2 * i), a = two_##AVERAGE(averages + 2 * i);                          \
            const uint32_t even = round_##AVERAGE(moved(a.even, s.even, weight, way), upper, lower);                   \
            const uint32_t odd = round_##AVERAGE(moved(a.odd, s.odd, weight, way), lower, upper);                      \
            const uint32_t both = even >> 16 | (odd & 0xFFFF0000u);                                                    \
            memcpy(averages + 2 * i, &both, sizeof both);                                                              \
        }                                                                                                              \
        if (head)                                                                                                      \
            NAME##_one(source, average, first, key, weight, way);                                                      \
        if (tail < count)                                                                                              \
            NAME##_one(source + tail, average + tail, first + (uint64_t)tail, key, weight, way);                       \
    }                                                                                                                  \
    INLINE void NAME##_body(const SOURCE_TYPE *restrict source, uint16_t *restrict average, int64_t count,             \
                            uint64_t first, uint64_t key, double weight)                                               \
    {                                                                                                                  \
        const float w = (float)weight;                                                                                 \
        if (weight == 1.0)                                                                                             \
            NAME##_way(source, average, count, first, key, w, COPY);                                                   \
        else if (w < 0.5f)                                                                                             \
            NAME##_way(source, average, count, first, key, w, BELOW_HALF);                                             \
        else                                                                                                           \
            NAME##_way(source, average, count, first, key, w, FROM_HALF);                                              \
    }                                                                                                                  \
    VERSIONS(NAME##_loop, NAME##_body,                                                                                 \
             (const SOURCE_TYPE *restrict source, uint16_t *restrict average, int64_t count, uint64_t first,           \
              uint64_t key, double weight),                                                                            \
             (source, average, count, first, key, weight))                                                             \
    DEFINE_UPDATE(NAME, 1,                                                                                             \
                  NAME##_loop(POINTER(const SOURCE_TYPE, row[0]), POINTER(uint16_t, *average), row[1],                 \
                              (uint64_t)row[2], segment_key(step, (uint64_t)row[3], (uint64_t)row[2] >> 1),            \
                              weights[profile]))

DEFINE_STOCHASTIC(stochastic_float32_bfloat16, float32, float, bfloat16)
DEFINE_STOCHASTIC(stochastic_float64_bfloat16, float64, double, bfloat16)
DEFINE_STOCHASTIC(stochastic_float16_bfloat16, float16, uint16_t, bfloat16)
DEFINE_STOCHASTIC(stochastic_bfloat16_bfloat16, bfloat16, uint16_t, bfloat16)
DEFINE_STOCHASTIC(stochastic_float32_float16, float32, float, float16)
DEFINE_STOCHASTIC(stochastic_float64_float16, float64, double, float16)
DEFINE_STOCHASTIC(stochastic_float16_float16, float16, uint16_t, float16)
DEFINE_STOCHASTIC(stochastic_bfloat16_float16, bfloat16, uint16_t, float16)
