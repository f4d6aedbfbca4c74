/* Groups of small floats under one scale: mxfp4, mxfp8, nvfp4 and rows of fp8. Source:
 * mlx/backend/metal/ kernels/{fp_quantized,fp4,fp8}.h and, for the cpu flavour, mlx/ops.cpp
 * (quantize). */
#include "num/fp.h"
#include "num/group.h"

/* Largest magnitude of w[n], n a multiple of 8. */
static float largest(const float *w, int64_t n)
{
    float lanes[8] = {0}, top = 0;
    for (int64_t i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) {
            float a = fabsf(w[i + j]);
            lanes[j] = a > lanes[j] ? a : lanes[j];
        }
    for (int j = 0; j < 8; j++) top = lanes[j] > top ? lanes[j] : top;
    return top;
}

/* The E2M1 codes nearest to y[n], saturating at 6. metal: ties to the even code, the sign of what
 * vanishes stays. cpu: the first table entry at the smallest distance, which in its order is the
 * smaller magnitude, and +0 before -0. */
static void e2m1_codes(const float *y, int64_t n, num_flavour flavour, uint8_t *codes)
{
    for (int64_t i = 0; i < n; i++) {
        float a = fabsf(y[i]);
        int sign = (int)(fp_bits(y[i]) >> 28 & 8), c = a > 0.25f;
        c += (a > 1.25f) + (a > 2.5f) + (a > 5.0f);
        if (flavour == NUM_METAL) {
            c += (a >= 0.75f) + (a >= 1.75f) + (a >= 3.5f);
        } else {
            c += (a > 0.75f) + (a > 1.75f) + (a > 3.5f);
            sign = c ? sign : 0;
        }
        codes[i] = (uint8_t)(c | sign);
    }
}

/* The exponent e of `d` under the rule, as e + 127 within 0 .. 254. d >= 0 and finite. */
static uint8_t e8m0_for(float d, num_mx_rule rule)
{
    if (d == 0) return 0;
    int e;
    float m = frexpf(d, &e); /* d = m 2^e, m in [1/2, 1) */
    /* The greatest float below sqrt(1/2), where log2 d rounds up: no dependence on a log2. */
    float limit = rule == NUM_MX_CEIL ? 0.5f : 0x1.6a09e6p-1f;
    if (m <= limit) e--;
    return (uint8_t)(e < -127 ? 0 : e > 127 ? 254 : e + 127);
}

uint8_t num_mx_group(const num_format *f, const float *w, uint8_t *codes)
{
    float y[32], d = largest(w, 32) / (f->mode == NUM_MXFP4 ? 6.0f : 448.0f);
    uint8_t byte = e8m0_for(d, f->mx_rule);
    if (d == 0 && f->flavour == NUM_CPU) byte = 127;
    float inverse = 1.0f / fp_e8m0_decode(byte);
    for (int i = 0; i < 32; i++) y[i] = w[i] * inverse;
    if (f->mode == NUM_MXFP4)
        e2m1_codes(y, 32, f->flavour, codes);
    else
        for (int i = 0; i < 32; i++) codes[i] = fp_e4m3_encode(y[i]);
    return byte;
}

uint8_t num_nvfp4_group(const num_format *f, const float *w, uint8_t *codes)
{
    /* Under the least scale that matters every weight is far below the smallest E4M3 step. */
    float y[16], gain = f->global_scale > 1e-30f ? 2688.0f / f->global_scale : 1.0f;
    uint8_t byte = fp_e4m3_encode(largest(w, 16) / 6.0f * gain);
    if (byte == 0) byte = f->least_scale;
    float scale = fp_e4m3_decode(byte);
    if (scale == 0)
        for (int i = 0; i < 16; i++) y[i] = w[i] * 0.0f; /* signed zeros */
    else if (f->flavour == NUM_METAL)
        for (int i = 0; i < 16; i++) y[i] = w[i] * (gain / scale);
    else
        for (int i = 0; i < 16; i++) y[i] = w[i] / scale * gain;
    e2m1_codes(y, 16, f->flavour, codes);
    return byte;
}

/* A row of zeros, or one that vanishes in the scale's type, keeps a scale of 1. */
float num_fp8_row(const num_format *f, const float *w, int64_t cols, uint8_t *codes)
{
    float top = largest(w, cols & ~7);
    for (int64_t i = cols & ~7; i < cols; i++) top = fabsf(w[i]) > top ? fabsf(w[i]) : top;
    float scale = num_rounded(top / 448.0f, f->scale_dtype);
    if (scale == 0) scale = 1;
    for (int64_t i = 0; i < cols; i++) codes[i] = fp_e4m3_encode(w[i] / scale);
    return scale;
}
