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

/* Weights are asked for this many bytes before they are read, or as many as are read side by side.
 * The prefetcher of the hardware does not keep up with some twenty instructions per cache line.
 * They go to the second-level cache, which has more misses under way than the first: on Zen 4 a
 * thread reads twice as fast that way. */
enum { KERN_PREFETCH = 16384 };

/* For rows from `row` on; 0 where the matrix ends before that: what follows it in the file is
 * seldom what is read next. */
static inline int64_t kern_ahead(const num_matrix *w, int64_t row, int n_rows)
{
    int64_t together = n_rows * w->row_bytes;
    int64_t ahead = together > KERN_PREFETCH ? together : KERN_PREFETCH;
    return ahead < (w->rows - row) * w->row_bytes ? ahead : 0;
}

static inline void kern_prefetch(const uint8_t *p)
{
    __builtin_prefetch(p, 0, 2);
}

static inline void kern_prefetch_all(const uint8_t *p, int64_t n)
{
    for (int64_t i = 0; i < n; i += 64) kern_prefetch(p + i);
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
