/* What the variants share inside the room: their tables, the constants of kern_expf, and where
 * packed codes lie. */
#ifndef KERN_CONST_H
#define KERN_CONST_H

#include "kern/kern.h"

extern const kern_ops kern_scalar;
extern const kern_row_ops kern_plain_row;
#ifndef MOONLET_SCALAR_ONLY
extern const kern_ops kern_avx2;
extern const kern_ops kern_avx512base;
extern const kern_ops kern_avx512vnni;
extern const kern_ops kern_avx512;
extern const kern_ops kern_avx512bf16;
extern const kern_ops kern_amx;
extern const num_fit_ops kern_avx2_fit;
extern const num_fit_ops kern_avx512_fit;
extern const kern_row_ops kern_avx2_row;
extern const kern_row_ops kern_avx512_row;
#endif

/* Partial sums of a dot product: one AVX-512 register, two of AVX2. */
enum { KERN_LANES = 16 };

/* Tokens that meet a block of decoded rows while both are in the second-level cache. */
enum { KERN_TOKENS = 32 };

/* Weights are asked for before they are read, into the second-level cache, which has more misses
 * under way than the first: the hardware's prefetcher does not follow rows side by side. Where as
 * many are under way as can be, Zen 4 forgets what it is asked for, so lines are asked for several
 * times, KERN_ASK_STEP bytes apart: the oftener, the less there is to do with them. */
enum { KERN_ASK_STEP = 5120, KERN_ASKS = 4, KERN_PREFETCH = 16384 };

/* From where lines are asked for while rows are read side by side. */
typedef struct kern_ahead {
    const uint8_t *from[KERN_ASKS];
} kern_ahead;

/* What is asked for is an address and no pointer: it may lie behind the end of a matrix, where C
 * makes none, and asking touches nothing. */
static inline uintptr_t kern_address(const uint8_t *p, int64_t offset)
{
    return (uintptr_t)p + (uintptr_t)offset;
}

/* For n_rows rows from `row` on: little behind the end of the matrix, as what follows it in the
 * file is seldom what is read next. */
static inline kern_ahead kern_look_ahead(const num_matrix *w, int64_t row, int n_rows)
{
    kern_ahead out;
    int64_t together = n_rows * w->row_bytes, left = (w->rows - row) * w->row_bytes - together;
    int64_t ahead = together > KERN_ASK_STEP ? together : KERN_ASK_STEP;
    for (int i = 0; i < KERN_ASKS; i++, ahead += KERN_ASK_STEP) {
        int64_t offset = ahead < left ? ahead : left > 0 ? left : 0;
        out.from[i] = w->codes + row * w->row_bytes + offset;
    }
    return out;
}

static inline void kern_prefetch(uintptr_t address)
{
    __builtin_prefetch((const void *)address, 0, 2);
}

/* Asks n_asks <= KERN_ASKS times, a constant, for line `at` of what the rows hold in the order of
 * memory. */
static inline void kern_ask(const kern_ahead *ahead, int n_asks, int64_t at)
{
    for (int i = 0; i < n_asks; i++) kern_prefetch(kern_address(ahead->from[i], at));
}

/* n bytes, `offset` behind p. */
static inline void kern_prefetch_all(const uint8_t *p, int64_t offset, int64_t n)
{
    for (int64_t i = 0; i < n; i += 64) kern_prefetch(kern_address(p, offset + i));
}

/* x[i] = exp(x[i] - top), 0 for -inf; returns their sum: the scalar one, for softmax and both kinds
 * of attention. */
float kern_exps(float *x, int64_t n, float *top);

/* Outside of these e^x is above FLT_MAX or below FLT_MIN. */
#define EXP_MAX 88.72283f
#define EXP_MIN -87.33654f

#define EXP_LOG2E  1.44269504f
#define EXP_ROUND  12582912.0f /* 1.5 * 2^23: adding it rounds, into the low bits */
#define EXP_LN2_HI 0.693359375f
#define EXP_LN2_LO -2.12194440e-4f
#define EXP_C0     5.0000001201e-1f
#define EXP_C1     1.6666665459e-1f
#define EXP_C2     4.1665795894e-2f
#define EXP_C3     8.3334519073e-3f
#define EXP_C4     1.3981999507e-3f
#define EXP_C5     1.9875691500e-4f

/* Lane j of 16 codes of `bits` <= 7 in a row: a byte shuffle that fetches the two bytes it may lie
 * in (and two zeros), and how far to shift them. Used with constants only. */
#define CODE_BYTES(j, bits)                                                                        \
    (int)(0x80800000u | (unsigned)(((j) * (bits) / 8 + 1) << 8) | (unsigned)((j) * (bits) / 8))
#define CODE_SHIFT(j, bits) ((j) * (bits) % 8)

/* f(j, b) for lanes 0-7 and 8-15 */
#define EACH_LO(f, b) f(0, b), f(1, b), f(2, b), f(3, b), f(4, b), f(5, b), f(6, b), f(7, b)
#define EACH_HI(f, b) f(8, b), f(9, b), f(10, b), f(11, b), f(12, b), f(13, b), f(14, b), f(15, b)

#endif
