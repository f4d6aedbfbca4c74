/* scalar: every kernel in plain C. This is the definition in which the vector files are read: 16
 * lanes, explicit fmaf, no other contraction. Slow on purpose where clarity asks for it. */
#include <math.h>

#include "kern/kern.h"
#include "kern/bf16.h"
#include "kern/int8.h"
#include "kern/int_attn.h"
#include "kern/kern_const.h"
#include "num/fp.h"

enum { LANES = KERN_LANES };

static float tree_sum(float lane[LANES])
{
    for (int half = LANES / 2; half >= 1; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

/* Lanes past the end multiply zeros: adding +0 turns a -0 into +0, so it has to be done. */
static float dot(const float *a, const float *b, int64_t n)
{
    float lane[LANES] = {0};
    for (int64_t k = 0; k < n; k += LANES)
        for (int j = 0; j < LANES; j++) {
            int in = k + j < n;
            lane[j] = fmaf(in ? a[k + j] : 0.0f, in ? b[k + j] : 0.0f, lane[j]);
        }
    return tree_sum(lane);
}

/* e^x = 2^n p(r) with n = round(x / ln 2), |r| <= ln(2)/2; ln 2 in two parts, so that r is exact
 * to f32. The polynomial is that of Cephes' expf. 2^n goes in by adding to the exponent: between
 * the two limits the result is a normal number. */
float kern_expf(float x)
{
    if (isnan(x)) return x;
    if (x > EXP_MAX) return INFINITY;
    if (x < EXP_MIN) return 0.0f;
    float t = fmaf(x, EXP_LOG2E, EXP_ROUND), n = t - EXP_ROUND;
    float r = fmaf(n, -EXP_LN2_HI, x);
    r = fmaf(n, -EXP_LN2_LO, r);
    float p = EXP_C5;
    p = fmaf(p, r, EXP_C4);
    p = fmaf(p, r, EXP_C3);
    p = fmaf(p, r, EXP_C2);
    p = fmaf(p, r, EXP_C1);
    p = fmaf(p, r, EXP_C0);
    p = fmaf(p, r * r, r) + 1.0f;
    return fp_from_bits(fp_bits(p) + (fp_bits(t) << 23));
}

float kern_sigmoidf(float x)
{
    return 1.0f / (1.0f + kern_expf(-x));
}

float kern_softplusf(float x)
{
    return x > 20.0f ? x : log1pf(kern_expf(x));
}

static float silu_one(float x)
{
    return x / (1.0f + kern_expf(-x));
}

static void dots(const float *w, int64_t ldw, int n_rows, const float *x, int64_t ldx, int64_t n_x,
                 int64_t cols, float *y, int64_t ldy)
{
    for (int64_t t = 0; t < n_x; t++)
        for (int r = 0; r < n_rows; r++) y[t * ldy + r] = dot(w + r * ldw, x + t * ldx, cols);
}

static void product(const num_matrix *w, int64_t row, int64_t n_rows, const float *x, float *y,
                    float *scratch)
{
    for (int64_t r = 0; r < n_rows; r++) {
        num_row_decode(w, row + r, scratch);
        y[r] = dot(scratch, x, w->cols);
    }
}

static void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *out)
{
    float factor = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) {
        float scaled = x[i] * factor;
        out[i] = weight ? scaled * weight[i] : scaled;
    }
}

static void l2_norm(const float *x, int64_t n, float eps, float scale, float *out)
{
    float factor = 1.0f / sqrtf(dot(x, x, n) + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * scale;
}

static void silu(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] = silu_one(x[i]);
}

static void silu_mul(float *gate, const float *up, int64_t n)
{
    for (int64_t i = 0; i < n; i++) gate[i] = silu_one(gate[i]) * up[i];
}

static void sigmoid_mul(float *x, const float *gate, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] *= kern_sigmoidf(gate[i]);
}

static void axpy(float a, const float *x, float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = fmaf(a, x[i], y[i]);
}

float kern_exps(float *x, int64_t n, float *top)
{
    float lane[LANES] = {0};
    *top = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        if (x[i] > *top) *top = x[i];
    for (int64_t i = 0; i < n; i++) {
        /* where nothing is finite there is no maximum to subtract */
        x[i] = x[i] == -INFINITY ? 0.0f : kern_expf(x[i] - *top);
        lane[i % LANES] += x[i];
    }
    return tree_sum(lane);
}

static float softmax(float *x, int64_t n)
{
    float top, sum = kern_exps(x, n, &top);
    if (sum == 0.0f) return -INFINITY;
    float factor = 1.0f / sum;
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
    return top + logf(sum);
}

static void conv_silu(const float *const *rows, const float *w, int k, int64_t n, float *out)
{
    for (int64_t c = 0; c < n; c++) {
        float sum = 0.0f;
        for (int j = 0; j < k; j++) sum = fmaf(w[c * k + j], rows[j][c], sum);
        out[c] = silu_one(sum);
    }
}

static void delta_rule(float *S, int64_t dk, int64_t dv, const kern_delta *a)
{
    for (int64_t t = 0; t < a->n; t++) {
        const float *q = a->q + t * a->ld_qk, *k = a->k + t * a->ld_qk;
        float *v = a->v + t * a->ld_v, decay = a->decay[t * a->ld_gates];
        for (int64_t i = 0; i < dv; i++) {
            float *row = S + i * dk;
            float d = a->beta[t * a->ld_gates] * (v[i] - decay * dot(row, k, dk));
            for (int64_t j = 0; j < dk; j++) row[j] = fmaf(d, k[j], decay * row[j]);
            v[i] = dot(row, q, dk);
        }
    }
}

static float stored(const void *p, int is_f16, int64_t i)
{
    return is_f16 ? fp_f16_decode(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

static void score(const kern_kv *kv, const float *q, float *s)
{
    for (int64_t j = 0; j < kv->n; j++) {
        const void *page = kv->keys[j / KERN_PAGE];
        s[j] = 0.0f;
        for (int64_t i = 0; i < kv->dim; i++)
            s[j] = fmaf(q[i], stored(page, kv->is_f16, i * KERN_PAGE + j % KERN_PAGE), s[j]);
    }
}

static void add_values(const kern_kv *kv, const float *e, float *out)
{
    for (int64_t i = 0; i < kv->dim; i++) {
        out[i] = 0.0f;
        for (int64_t j = 0; j < kv->n; j++)
            out[i] = fmaf(
                e[j], stored(kv->values[j / KERN_PAGE], kv->is_f16, j % KERN_PAGE * kv->dim + i),
                out[i]);
    }
}

static void attend(const kern_kv *kv, const float *q, int64_t n_q, float scale, float *scores,
                   const kern_found *found)
{
    for (int64_t t = 0; t < n_q; t++) {
        float *s = scores + t * KERN_BLOCK;
        score(kv, q + t * kv->dim, s);
        for (int64_t j = 0; j < kv->n; j++) s[j] *= scale;
        found->sum[t] = kern_exps(s, kv->n, &found->top[t]);
        add_values(kv, s, found->out + t * kv->dim);
    }
}

static void axpby(float b, const float *x, float a, float *acc, int64_t n)
{
    for (int64_t i = 0; i < n; i++) acc[i] = fmaf(b, x[i], a * acc[i]);
}

static void f16_encode(const float *x, uint16_t *out, int64_t n)
{
    for (int64_t i = 0; i < n; i++) out[i] = fp_f16_encode(x[i]);
}

static void f16_decode(const uint16_t *x, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i++) out[i] = fp_f16_decode(x[i]);
}

const kern_ops kern_scalar = {
    .name = "scalar",
    .level = CPU_SCALAR,
    .decode = {num_row_decode, num_row_decode, num_row_decode, num_row_decode, num_row_decode,
               num_row_decode, num_row_decode, num_row_decode},
    .product = product,
    .dots = dots,
    .rms_norm = rms_norm,
    .l2_norm = l2_norm,
    .silu = silu,
    .silu_mul = silu_mul,
    .sigmoid_mul = sigmoid_mul,
    .axpy = axpy,
    .softmax = softmax,
    .conv_silu = conv_silu,
    .delta_rule = delta_rule,
    .attend = attend,
    .axpby = axpby,
    .f16_encode = f16_encode,
    .f16_decode = f16_decode,
    .int8 = &kern_scalar_int8,
    .bf16 = &kern_scalar_bf16,
    .attn = &kern_scalar_attn,
    .fit = &num_fit_plain,
    .row = &kern_plain_row,
};
