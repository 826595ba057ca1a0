/* What the C files share: numbers of 16 bits, and the choice of instructions at run time.
 *
 * There is no link against torch or Python: pointers come in as integers, and the OpenMP runtime is the one that torch
 * has loaded. Every product is fused with a sum where the source says so and nowhere else, so that all kernels have the
 * same bits: the files are compiled with -ffp-contract=off.
 */
#ifndef POLYAK_COMMON_H
#define POLYAK_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

#define INLINE static inline __attribute__((always_inline))

/* A loop is compiled for each of these, and the best that the processor has is taken at run time. */
#if defined(__x86_64__) && defined(__GNUC__)
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#define WITH_AVX2 __attribute__((target("avx2,fma")))
INLINE int vectors(void)
{
    const int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return has_avx2 ? 1 + has_avx512 : 0;
}
#else
#define WITH_AVX512
#define WITH_AVX2
INLINE int vectors(void) { return 0; }
#endif

/* The three versions of a loop, and NAME, which calls the best one. */
#define VERSIONS(NAME, BODY, PARAMETERS, ARGUMENTS)                                                                    \
    WITH_AVX512 static void NAME##_avx512 PARAMETERS { BODY ARGUMENTS; }                                               \
    WITH_AVX2 static void NAME##_avx2 PARAMETERS { BODY ARGUMENTS; }                                                   \
    static void NAME##_plain PARAMETERS { BODY ARGUMENTS; }                                                            \
    INLINE void NAME PARAMETERS                                                                                        \
    {                                                                                                                  \
        void(*const choices[]) PARAMETERS = {NAME##_plain, NAME##_avx2, NAME##_avx512};                                \
        choices[vectors()] ARGUMENTS;                                                                                  \
    }

/* The chunks of a table, and how much work comes before the end of each. Threads take portions of it one after another.
 *
 * The first portion of each thread is half of its even share; later ones get smaller. The first is the same in most
 * calls, so that a core finds it in its own cache, and the last are so small that no thread waits long for another,
 * however uneven the chunks are or slow a core is.
 */
typedef struct {
    int64_t num_chunks, num_threads;
    const int64_t *ends; /* of each chunk, in elements from the beginning of the first */
} Work;

#define HALVINGS 5 /* the last takes all of the rest */

INLINE int64_t num_portions(const Work *work)
{
    return work->num_threads > 1 ? HALVINGS * work->num_threads : 1;
}

/* The first chunk of a portion; that of the one after the last is the number of chunks. */
INLINE int64_t first_chunk(const Work *work, int64_t portion)
{
    if (portion == 0)
        return 0;
    if (portion == num_portions(work))
        return work->num_chunks;
    const int64_t total = work->ends[work->num_chunks - 1], halving = portion / work->num_threads;
    const int64_t rest = total >> halving, share = halving < HALVINGS - 1 ? rest / 2 : rest;
    const int64_t before = total - rest + share / work->num_threads * (portion % work->num_threads);
    int64_t low = 0, high = work->num_chunks;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (work->ends[middle] <= before)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* DO for every `chunk` of the work. */
#define FOR_EACH_CHUNK(WORK, DO)                                                                                       \
    const int num_threads = (int)(WORK)->num_threads;                                                                  \
    _Pragma("omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_threads > 1)")                     \
    for (int64_t portion = 0; portion < num_portions(WORK); portion++) {                                               \
        const int64_t stop = first_chunk(WORK, portion + 1);                                                           \
        for (int64_t chunk = first_chunk(WORK, portion); chunk < stop; chunk++) {                                      \
            DO;                                                                                                        \
        }                                                                                                              \
    }

#define POINTER(TYPE, ADDRESS) ((TYPE *)(intptr_t)(ADDRESS))

INLINE int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

INLINE uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE float from_float32(float value) { return value; }
INLINE float from_bfloat16(uint16_t value) { return float_of((uint32_t)value << 16); }

/* Shifted into place, a number of 16 bits is too small by 2 ** 112, also a subnormal one; only infinities and NaNs need
 * help. The compiler cannot do this conversion many at a time by itself. */
INLINE float from_float16(uint16_t value)
{
    const uint32_t magnitude = (uint32_t)(value & 0x7FFF) << 13;
    const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
    const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
    return float_of(scaled | special | (uint32_t)(value & 0x8000) << 16);
}

#endif
