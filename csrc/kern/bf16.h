/* bf16: products whose activations are rounded to bf16; the definition.
 *
 * Numbers of x are rounded to even, after subnormal ones became zeros of their sign. Weights are
 * those of num_row_decode, which are exact in bf16 here (mxfp8: E4M3 times a power of two, 0 where
 * that is subnormal). A product has 16 partial sums; of 32
 * columns after the other, lane j adds column 2j + 1 and then column 2j:
 *   sum = fma(w[2j + 1], x[2j + 1], sum);  sum = fma(w[2j], x[2j], sum)
 * and the lanes are added as the tree of kern.h. fp8 begins anew with every group of columns, with
 * codes for weights, and adds what lanes come to by sum = fma(scale, group's sum, sum), groups
 * rising. In all of this subnormal numbers are taken for zeros, and results that would be
 * subnormal, judged after rounding with any exponent, become zeros of their sign.
 *
 * That is what VDPBF16PS computes (Intel SDM volume 2, which fixes order, rounding and zeros), at
 * twice the rate of f32 on Zen 4 and at half of it on Sapphire Rapids. Two fused multiply-adds give
 * the same bits where MXCSR has DAZ and FTZ set. So processors may take what is faster there. */
#ifndef KERN_BF16_H
#define KERN_BF16_H

#include "kern/kern.h"

/* Columns that one step adds up. */
enum { BF16_STEP = 32 };

extern const kern_bf16_ops kern_scalar_bf16;
#ifndef MOONLET_SCALAR_ONLY
extern const kern_bf16_ops kern_avx512_bf16;

/* Scales of n_rows rows of fp8 as f32, [n_rows][groups]. */
void kern_avx512_scales(const num_matrix *w, int64_t row, int64_t n_rows, float *out);

#include <immintrin.h>

/* Evaluates `call` with subnormal numbers as zeros. It has to be a function that is not inlined:
 * nothing else keeps compilers from moving arithmetic past the switch. */
#define BF16_FLUSHED(call)                                                                         \
    do {                                                                                           \
        unsigned before = _mm_getcsr();                                                            \
        _mm_setcsr(before | _MM_FLUSH_ZERO_ON | BF16_DAZ);                                         \
        call;                                                                                      \
        _mm_setcsr(before);                                                                        \
    } while (0)
enum { BF16_DAZ = 0x40 };
#endif

#endif
