/* Passes over the bits of tensors, whatever numbers they are: exchanges, copies, sums, the search for infinities and NaNs.
 *
 * A table has one row for each chunk; its columns stand at each function. An exchange that was done twice would be
 * none, and its caller may be interrupted right after it: so it notes in `done`, itself, that it is done, and does
 * nothing from then on.
 */
#include "common.h"

/* It must equal the number in work.py. Raise both whenever a function or a structure changes. */
EXPORT int polyak_version(void) { return 3; }

/* Two addresses and a number of bytes. */

INLINE void exchange_body(char *restrict one, char *restrict other, int64_t num_bytes)
{
    int64_t i = 0;
    for (; i + 8 <= num_bytes; i += 8) {
        uint64_t left, right;
        memcpy(&left, one + i, 8);
        memcpy(&right, other + i, 8);
        memcpy(one + i, &right, 8);
        memcpy(other + i, &left, 8);
    }
    for (; i < num_bytes; i++) {
        const char left = one[i];
        one[i] = other[i];
        other[i] = left;
    }
}
VERSIONS(exchange_loop, exchange_body, (char *restrict one, char *restrict other, int64_t num_bytes),
         (one, other, num_bytes))

EXPORT void polyak_exchange(const Work *work, const int64_t *table, int64_t *done)
{
    if (*done)
        return;
    FOR_EACH_CHUNK(work, const int64_t *row = table + 3 * chunk;
                   exchange_loop(POINTER(char, row[0]), POINTER(char, row[1]), row[2]))
    *done = 1;
}

/* Where to, where from, and a number of bytes. */

EXPORT void polyak_copy(const Work *work, const int64_t *table, int64_t *unused)
{
    (void)unused;
    FOR_EACH_CHUNK(work, const int64_t *row = table + 3 * chunk;
                   memcpy(POINTER(char, row[0]), POINTER(char, row[1]), (size_t)row[2]))
}

/* The addresses of bfloat16 and of float32, and a number of elements; see halves.py. */

INLINE void enter_body(uint16_t *restrict source, uint32_t *restrict average, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        const uint32_t word = average[i], magnitude = word & 0x7FFFFFFFu;
        const uint32_t cut = word >> 16, rounded = (word + 0x8000u) >> 16;
        /* A NaN whose upper half would be that of an infinity is made quiet. */
        const uint32_t quiet = magnitude > 0x7F800000u && magnitude < 0x7F810000u ? 0x40u : 0u;
        const uint32_t upper = magnitude >= 0x7F800000u ? cut | quiet : rounded;
        const uint32_t rest = (word - (upper << 16)) & 0xFFFFu;
        average[i] = (uint32_t)source[i] << 16 | rest;
        source[i] = (uint16_t)upper;
    }
}
VERSIONS(enter_loop, enter_body, (uint16_t *restrict source, uint32_t *restrict average, int64_t count),
         (source, average, count))

INLINE void leave_body(uint16_t *restrict source, uint32_t *restrict average, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        const uint32_t slot = average[i], upper = source[i], rest = slot & 0xFFFFu;
        /* The rest has a sign, but for NaNs. */
        const uint32_t borrow = (upper & 0x7FFFu) <= 0x7F80u && (rest & 0x8000u) ? 0x10000u : 0u;
        average[i] = (upper << 16) + rest - borrow;
        source[i] = (uint16_t)(slot >> 16);
    }
}
VERSIONS(leave_loop, leave_body, (uint16_t *restrict source, uint32_t *restrict average, int64_t count),
         (source, average, count))

#define DEFINE_HALVES(NAME)                                                                                            \
    EXPORT void polyak_##NAME##_halves(const Work *work, const int64_t *table, int64_t *done)                          \
    {                                                                                                                  \
        if (*done)                                                                                                     \
            return;                                                                                                    \
        FOR_EACH_CHUNK(work, const int64_t *row = table + 3 * chunk;                                                   \
                       NAME##_loop(POINTER(uint16_t, row[0]), POINTER(uint32_t, row[1]), row[2]))                      \
        *done = 1;                                                                                                     \
    }

DEFINE_HALVES(enter)
DEFINE_HALVES(leave)

/* An address and a number of elements; one result a chunk. */

#define DEFINE_REDUCTION(NAME, TYPE, START, EACH)                                                                      \
    INLINE void NAME##_body(const TYPE *restrict tensor, int64_t count, int64_t *restrict result)                      \
    {                                                                                                                  \
        START;                                                                                                         \
        for (int64_t i = 0; i < count; i++)                                                                            \
            EACH;                                                                                                      \
        *result = (int64_t)found;                                                                                      \
    }                                                                                                                  \
    VERSIONS(NAME##_loop, NAME##_body, (const TYPE *restrict tensor, int64_t count, int64_t *restrict result),         \
             (tensor, count, result))                                                                                  \
    EXPORT void polyak_##NAME(const Work *work, const int64_t *table, int64_t *results)                                \
    {                                                                                                                  \
        FOR_EACH_CHUNK(work, NAME##_loop(POINTER(const TYPE, table[2 * chunk]), table[2 * chunk + 1],                  \
                                         results + chunk))                                                             \
    }

#define DEFINE_NON_FINITE(NAME, TYPE, EXPONENT)                                                                        \
    DEFINE_REDUCTION(NAME, TYPE, TYPE found = 0, found |= (TYPE)((tensor[i] & (TYPE)(EXPONENT)) == (TYPE)(EXPONENT)))

DEFINE_NON_FINITE(non_finite_float16, uint16_t, 0x7C00)
DEFINE_NON_FINITE(non_finite_bfloat16, uint16_t, 0x7F80)
DEFINE_NON_FINITE(non_finite_float32, uint32_t, 0x7F800000)
DEFINE_NON_FINITE(non_finite_float64, uint64_t, 0x7FF0000000000000)

DEFINE_REDUCTION(sum_16, int16_t, int64_t found = 0, found += tensor[i])
DEFINE_REDUCTION(sum_32, int32_t, int64_t found = 0, found += tensor[i])
DEFINE_REDUCTION(sum_64, int64_t, uint64_t found = 0, found += (uint64_t)tensor[i])
