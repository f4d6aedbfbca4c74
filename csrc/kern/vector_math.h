/* The kernels that do not look into a matrix, over v16. Included once by avx2.c and avx512.c;
 * scalar.c says what they compute. */
#ifndef KERN_VECTOR_MATH_H
#define KERN_VECTOR_MATH_H

#include <math.h>
#include <string.h>

#include "kern/kern_const.h"
#include "kern/vector_sum.h"

/* Columns k, k+1, ... of which n >= 1 are left: a whole load where possible. */
V16_FN v16 v16_load_upto(const float *p, int64_t n)
{
    return n >= KERN_LANES ? v16_load(p) : v16_load_n(p, n);
}

V16_FN void v16_store_upto(float *p, v16 a, int64_t n)
{
    if (n >= KERN_LANES)
        v16_store(p, a);
    else
        v16_store_n(p, a, n);
}

/* A whole register, or its first n lanes with zeros behind: what an operation made of the zeros of
 * a short load need not be zero (inf * 0). */
V16_FN v16 v16_upto(v16 a, int64_t n)
{
    return n >= KERN_LANES ? a : v16_first(a, n);
}

V16_FN v16 v16_exp(v16 x)
{
    v16 round = v16_set1(EXP_ROUND);
    v16 t = v16_fma(x, v16_set1(EXP_LOG2E), round), n = v16_sub(t, round);
    v16 r = v16_fma(n, v16_set1(-EXP_LN2_HI), x);
    r = v16_fma(n, v16_set1(-EXP_LN2_LO), r);
    v16 p = v16_set1(EXP_C5);
    p = v16_fma(p, r, v16_set1(EXP_C4));
    p = v16_fma(p, r, v16_set1(EXP_C3));
    p = v16_fma(p, r, v16_set1(EXP_C2));
    p = v16_fma(p, r, v16_set1(EXP_C1));
    p = v16_fma(p, r, v16_set1(EXP_C0));
    p = v16_add(v16_fma(p, v16_mul(r, r), r), v16_set1(1.0f));
    p = v16_add_exponent(p, t);
    p = v16_if_gt(x, v16_set1(EXP_MAX), v16_set1(INFINITY), p);
    p = v16_if_gt(v16_set1(EXP_MIN), x, v16_zero(), p);
    return v16_if_nan(x, x, p);
}

V16_FN v16 v16_one_plus_exp_minus(v16 x)
{
    return v16_add(v16_set1(1.0f), v16_exp(v16_sub(v16_set1(-0.0f), x)));
}

V16_FN v16 v16_silu(v16 x)
{
    return v16_div(x, v16_one_plus_exp_minus(x));
}

static float square_sum(const float *x, int64_t n)
{
    v16 sum = v16_zero();
    for (int64_t k = 0; k < n; k += KERN_LANES) {
        v16 a = v16_load_upto(x + k, n - k);
        sum = v16_fma(a, a, sum);
    }
    return v16_sum(sum);
}

static void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *out)
{
    v16 factor = v16_set1(1.0f / sqrtf(square_sum(x, n) / (float)n + eps));
    for (int64_t k = 0; k < n; k += KERN_LANES) {
        v16 a = v16_mul(v16_load_upto(x + k, n - k), factor);
        if (weight) a = v16_mul(a, v16_load_upto(weight + k, n - k));
        v16_store_upto(out + k, a, n - k);
    }
}

static void l2_norm(const float *x, int64_t n, float eps, float scale, float *out)
{
    v16 factor = v16_set1(1.0f / sqrtf(square_sum(x, n) + eps)), s = v16_set1(scale);
    for (int64_t k = 0; k < n; k += KERN_LANES)
        v16_store_upto(out + k, v16_mul(v16_mul(v16_load_upto(x + k, n - k), factor), s), n - k);
}

static void silu(float *x, int64_t n)
{
    for (int64_t k = 0; k < n; k += KERN_LANES)
        v16_store_upto(x + k, v16_silu(v16_load_upto(x + k, n - k)), n - k);
}

static void silu_mul(float *gate, const float *up, int64_t n)
{
    for (int64_t k = 0; k < n; k += KERN_LANES) {
        v16 a = v16_silu(v16_load_upto(gate + k, n - k));
        v16_store_upto(gate + k, v16_mul(a, v16_load_upto(up + k, n - k)), n - k);
    }
}

static void sigmoid_mul(float *x, const float *gate, int64_t n)
{
    for (int64_t k = 0; k < n; k += KERN_LANES) {
        v16 s = v16_div(v16_set1(1.0f), v16_one_plus_exp_minus(v16_load_upto(gate + k, n - k)));
        v16_store_upto(x + k, v16_mul(v16_load_upto(x + k, n - k), s), n - k);
    }
}

static void axpy(float a, const float *x, float *y, int64_t n)
{
    v16 va = v16_set1(a);
    for (int64_t k = 0; k < n; k += KERN_LANES) {
        v16 sum = v16_fma(va, v16_load_upto(x + k, n - k), v16_load_upto(y + k, n - k));
        v16_store_upto(y + k, sum, n - k);
    }
}

static float top_of(const float *x, int64_t n)
{
    float lane[KERN_LANES], top = -INFINITY;
    v16 best = v16_set1(-INFINITY);
    int64_t whole = n - n % KERN_LANES;
    for (int64_t k = 0; k < whole; k += KERN_LANES) {
        v16 a = v16_load(x + k);
        best = v16_if_gt(a, best, a, best);
    }
    v16_store(lane, best);
    for (int j = 0; j < KERN_LANES; j++)
        if (lane[j] > top) top = lane[j];
    for (int64_t k = whole; k < n; k++)
        if (x[k] > top) top = x[k];
    return top;
}

/* x[i] = exp(x[i] - top), 0 for -inf; returns their sum. */
static float exps(float *x, int64_t n, float *top)
{
    *top = top_of(x, n);
    v16 vtop = v16_set1(*top), sum = v16_zero(), lowest = v16_set1(-INFINITY);
    for (int64_t k = 0; k < n; k += KERN_LANES) {
        v16 a = v16_load_upto(x + k, n - k), e = v16_exp(v16_sub(a, vtop));
        /* -inf becomes 0 even when it is the maximum; a NaN stays one */
        e = v16_if_nan(a, a, v16_if_gt(a, lowest, e, v16_zero()));
        e = v16_upto(e, n - k);
        v16_store_upto(x + k, e, n - k);
        sum = v16_add(sum, e);
    }
    return v16_sum(sum);
}

static void scale_by(float *x, float factor, int64_t n)
{
    v16 f = v16_set1(factor);
    for (int64_t k = 0; k < n; k += KERN_LANES)
        v16_store_upto(x + k, v16_mul(v16_load_upto(x + k, n - k), f), n - k);
}

static float softmax(float *x, int64_t n)
{
    float top, total = exps(x, n, &top);
    if (total == 0.0f) return -INFINITY;
    scale_by(x, 1.0f / total, n);
    return top + logf(total);
}

/* Tap j of channels c .. c+15 of w [n][4]: a 4 x 4 transposition within each 128-bit lane, whose
 * rows are four channels' taps. */
V16_FN void load_taps(const float *w, v16 tap[4])
{
    v16 a = v16_load_quarters(w), b = v16_load_quarters(w + 4);
    v16 c = v16_load_quarters(w + 8), d = v16_load_quarters(w + 12);
    v16 ab = v16_unpack_lo(a, b), cd = v16_unpack_lo(c, d);
    tap[0] = v16_join_lo(ab, cd);
    tap[1] = v16_join_hi(ab, cd);
    ab = v16_unpack_hi(a, b);
    cd = v16_unpack_hi(c, d);
    tap[2] = v16_join_lo(ab, cd);
    tap[3] = v16_join_hi(ab, cd);
}

/* Qwen's kernels have 4 taps; other widths take the plain code. */
static void conv_silu(const float *const *rows, const float *w, int k, int64_t n, float *out)
{
    int64_t c = 0;
    for (; k == 4 && c + KERN_LANES <= n; c += KERN_LANES) {
        v16 tap[4], sum = v16_zero();
        load_taps(w + c * 4, tap);
        for (int j = 0; j < 4; j++) sum = v16_fma(tap[j], v16_load(rows[j] + c), sum);
        v16_store(out + c, v16_silu(sum));
    }
    for (; c < n; c++) {
        float sum = 0.0f;
        for (int j = 0; j < k; j++) sum = fmaf(w[c * k + j], rows[j][c], sum);
        out[c] = sum / (1.0f + kern_expf(-sum));
    }
}

static void f16_encode(const float *x, uint16_t *out, int64_t n)
{
    int64_t k = 0;
    for (; k + KERN_LANES <= n; k += KERN_LANES)
        _mm256_storeu_si256((void *)(out + k), v16_to_f16(v16_load(x + k)));
    if (k == n) return;
    uint16_t last[KERN_LANES];
    _mm256_storeu_si256((void *)last, v16_to_f16(v16_load_n(x + k, n - k)));
    memcpy(out + k, last, (size_t)(n - k) * sizeof *out);
}

static void f16_decode(const uint16_t *x, float *out, int64_t n)
{
    int64_t k = 0;
    for (; k + KERN_LANES <= n; k += KERN_LANES)
        v16_store(out + k, v16_from_f16(_mm256_loadu_si256((const void *)(x + k))));
    if (k == n) return;
    uint16_t last[KERN_LANES] = {0};
    memcpy(last, x + k, (size_t)(n - k) * sizeof *x);
    v16_store_n(out + k, v16_from_f16(_mm256_loadu_si256((const void *)last)), n - k);
}

#endif
