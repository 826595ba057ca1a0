/* The update of many averages in one pass over their sources.
 *
 *     average = fma(weight, source - average, average)                    for weight < 1/2
 *     average = fma(-(source - average), 1 - weight, source)              from there on
 *
 * This is the arithmetic of torch.lerp, bit for bit, so every product is fused with the sum that follows it and nothing
 * else is: the file is compiled with -ffp-contract=off. A weight of 1 copies and a weight of 0 leaves, whatever the
 * values are. There is no link against torch or Python: pointers come in as integers, and the OpenMP runtime is the one
 * that torch has loaded.
 *
 * A table has one row for each chunk: source, count, and the average of each profile.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* The same loops are compiled for each of these, and the best that the processor has is taken at run time. */
#if defined(__x86_64__) && defined(__GNUC__)
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))
#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))
static int vectors(void)
{
    const int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl");
    return has_avx2 ? 1 + has_avx512 : 0;
}
#else
#define WITH_AVX512
#define WITH_AVX2
static int vectors(void) { return 0; }
#endif

static inline float from_float(float value) { return value; }

static inline float from_bfloat16(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

#define LOOPS(NAME, TARGET, SOURCE, AVERAGE, LOAD, FMA)                                                               \
    TARGET static void NAME(const SOURCE *restrict source, AVERAGE *restrict average, int64_t count, double weight)   \
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
    }

/* The function for one pair of types: it goes through the table, several rows at a time. */
#define LERP(NAME, SOURCE, AVERAGE, LOAD, FMA)                                                                         \
    LOOPS(NAME##_avx512, WITH_AVX512, SOURCE, AVERAGE, LOAD, FMA)                                                      \
    LOOPS(NAME##_avx2, WITH_AVX2, SOURCE, AVERAGE, LOAD, FMA)                                                          \
    LOOPS(NAME##_plain, , SOURCE, AVERAGE, LOAD, FMA)                                                                  \
    EXPORT void polyak_##NAME(const int64_t *table, int64_t num_chunks, int64_t num_profiles, const double *weights,   \
                              int num_threads)                                                                         \
    {                                                                                                                  \
        void (*const choices[])(const SOURCE *, AVERAGE *, int64_t, double) = {NAME##_plain, NAME##_avx2,              \
                                                                               NAME##_avx512};                         \
        void (*const loops)(const SOURCE *, AVERAGE *, int64_t, double) = choices[vectors()];                          \
        const int64_t width = 2 + num_profiles;                                                                        \
        _Pragma("omp parallel for schedule(dynamic, 8) num_threads(num_threads) if (num_threads > 1)")                 \
        for (int64_t chunk = 0; chunk < num_chunks; chunk++) {                                                         \
            const int64_t *row = table + chunk * width;                                                                \
            for (int64_t profile = 0; profile < num_profiles; profile++)                                               \
                if (weights[profile] != 0.0)                                                                           \
                    loops((const SOURCE *)(intptr_t)row[0], (AVERAGE *)(intptr_t)row[2 + profile], row[1],             \
                          weights[profile]);                                                                           \
        }                                                                                                              \
    }

LERP(lerp_float32, float, float, from_float, fmaf)
LERP(lerp_float64, double, double, , fma)
LERP(lerp_bfloat16_float32, uint16_t, float, from_bfloat16, fmaf)
