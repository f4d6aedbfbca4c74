/* The delta rule over v16. Included once by avx2.c and avx512.c; scalar.c says what it computes. */
#ifndef KERN_VECTOR_DELTA_H
#define KERN_VECTOR_DELTA_H

#include "kern/kern_const.h"
#include "kern/vector_math.h"

/* Rows that go through all tokens together: their sums hide each other's latency, and they stay in
 * L1 however large the state is. */
enum { DELTA_ROWS = 4 };

/* The trees of four registers at once. */
V16_FN __m128 v16_sum4(v16 a, v16 b, v16 c, v16 d)
{
    __m256 ha = v16_halves(a), hb = v16_halves(b), hc = v16_halves(c), hd = v16_halves(d);
    __m256 ab =
        _mm256_add_ps(_mm256_permute2f128_ps(ha, hb, 0x20), _mm256_permute2f128_ps(ha, hb, 0x31));
    __m256 cd =
        _mm256_add_ps(_mm256_permute2f128_ps(hc, hd, 0x20), _mm256_permute2f128_ps(hc, hd, 0x31));
    __m256 two = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    __m256 one = _mm256_add_ps(_mm256_shuffle_ps(two, two, 0x88),
                               _mm256_shuffle_ps(two, two, 0xdd)); /* a c a c, b d b d */
    return _mm_unpacklo_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1));
}

/* out[r] = tree of sum[r], for one row or DELTA_ROWS */
V16_FN void delta_sums(int n_rows, const v16 *sum, float *out)
{
    if (n_rows == 1)
        out[0] = v16_sum(sum[0]);
    else
        _mm_storeu_ps(out, v16_sum4(sum[0], sum[1], sum[2], sum[3]));
}

/* One token's part in n_rows rows of S, a constant. */
V16_FN void delta_rows(float *S, int64_t dk, int n_rows, const float *q, const float *k, float *v,
                       float decay, float beta)
{
    v16 sum[DELTA_ROWS], change[DELTA_ROWS], keep = v16_set1(decay);
    float d[DELTA_ROWS];
    for (int r = 0; r < n_rows; r++) sum[r] = v16_zero();
    for (int64_t j = 0; j < dk; j += KERN_LANES) {
        v16 kj = v16_load_upto(k + j, dk - j);
        for (int r = 0; r < n_rows; r++)
            sum[r] = v16_fma(v16_load_upto(S + r * dk + j, dk - j), kj, sum[r]);
    }
    delta_sums(n_rows, sum, d);
    for (int r = 0; r < n_rows; r++) change[r] = v16_set1(beta * (v[r] - decay * d[r]));
    for (int r = 0; r < n_rows; r++) sum[r] = v16_zero();
    for (int64_t j = 0; j < dk; j += KERN_LANES) {
        v16 kj = v16_load_upto(k + j, dk - j), qj = v16_load_upto(q + j, dk - j);
        for (int r = 0; r < n_rows; r++) {
            v16 s = v16_mul(keep, v16_load_upto(S + r * dk + j, dk - j));
            s = v16_upto(v16_fma(change[r], kj, s), dk - j);
            v16_store_upto(S + r * dk + j, s, dk - j);
            sum[r] = v16_fma(s, qj, sum[r]);
        }
    }
    delta_sums(n_rows, sum, v);
}

V16_FN void delta_token(float *S, int64_t dk, int n_rows, const kern_delta *a, int64_t row,
                        int64_t t)
{
    delta_rows(S + row * dk, dk, n_rows, a->q + t * a->ld_qk, a->k + t * a->ld_qk,
               a->v + t * a->ld_v + row, a->decay[t * a->ld_gates], a->beta[t * a->ld_gates]);
}

/* The first token takes its rows one after the other: from memory they come in half the time that
 * they would take side by side, also with prefetching. */
V16_FN void delta_block(float *S, int64_t dk, int n_rows, const kern_delta *a, int64_t row)
{
    for (int r = 0; a->n > 0 && r < n_rows; r++) delta_token(S, dk, 1, a, row + r, 0);
    for (int64_t t = 1; t < a->n; t++) delta_token(S, dk, n_rows, a, row, t);
}

V16_FN void delta_blocks(float *S, int64_t dk, int64_t dv, const kern_delta *a)
{
    int64_t i = 0;
    for (; i + DELTA_ROWS <= dv; i += DELTA_ROWS) delta_block(S, dk, DELTA_ROWS, a, i);
    for (; i < dv; i++) delta_block(S, dk, 1, a, i);
}

static void delta_rule(float *S, int64_t dk, int64_t dv, const kern_delta *a)
{
    if (dk == 128) /* Qwen's: unrolled, no tails */
        delta_blocks(S, 128, dv, a);
    else
        delta_blocks(S, dk, dv, a);
}

#endif
