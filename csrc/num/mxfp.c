/* Groups of small floats under one scale: mxfp4, mxfp8, nvfp4 and rows of fp8. Source:
 * mlx/backend/metal/ kernels/{fp_quantized,fp4,fp8}.h and, for the cpu flavour, mlx/ops.cpp
 * (quantize). */
#include "num/fp.h"
#include "num/group.h"

float num_largest(const float *w, int64_t n)
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

/* The E2M1 code nearest to y, saturating at 6. metal: ties to the even code, the sign of what
 * vanishes stays. cpu: the first table entry at the smallest distance, which in its order is the
 * smaller magnitude, and +0 before -0. */
static inline uint8_t e2m1_even(float y)
{
    float a = fabsf(y);
    int c = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f);
    c += (a >= 3.5f) + (a > 5.0f);
    return (uint8_t)(c | (int)(fp_bits(y) >> 28 & 8));
}

static inline uint8_t e2m1_smaller(float y)
{
    float a = fabsf(y);
    int c = (a > 0.25f) + (a > 0.75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f);
    c += (a > 3.5f) + (a > 5.0f);
    return (uint8_t)(c ? c | (int)(fp_bits(y) >> 28 & 8) : 0);
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

void num_mx_group(uint8_t byte, num_group *g)
{
    float scale = fp_e8m0_decode(byte);
    *g = (num_group){.scale = scale, .code_scale = 1.0f / scale, .byte = byte};
}

void num_mx_minmax(const num_format *f, const float *w, num_group *g)
{
    float d = num_largest(w, 32) / (f->mode == NUM_MXFP4 ? 6.0f : 448.0f);
    int zeros = d == 0 && f->flavour == NUM_CPU;
    num_mx_group(zeros ? 127 : e8m0_for(d, f->mx_rule), g);
}

/* Under the least scale that matters every weight is far below the smallest E4M3 step. */
static float nvfp4_gain(const num_format *f)
{
    return f->global_scale > 1e-30f ? 2688.0f / f->global_scale : 1.0f;
}

void num_nvfp4_group(const num_format *f, uint8_t byte, num_group *g)
{
    float scale = fp_e4m3_decode(byte);
    *g = (num_group){.scale = scale, .byte = byte};
    if (f->global_scale > 0) g->scale = scale / num_format_divisor(f);
    if (f->flavour == NUM_METAL) {
        g->code_scale = scale == 0 ? 0 : nvfp4_gain(f) / scale; /* signed zeros */
    } else {
        g->code_scale = scale == 0 ? 1 : scale;
        g->code_bias = scale == 0 ? 0 : nvfp4_gain(f);
    }
}

void num_nvfp4_minmax(const num_format *f, const float *w, num_group *g)
{
    uint8_t byte = fp_e4m3_encode(num_largest(w, 16) / 6.0f * nvfp4_gain(f));
    num_nvfp4_group(f, byte ? byte : f->least_scale, g);
}

float num_group_inverse(const num_format *f, const num_group *g)
{
    int divides = f->mode == NUM_NVFP4 && f->flavour == NUM_CPU;
    return divides ? g->code_bias / g->code_scale : g->code_scale;
}

/* A row of zeros, or one that vanishes in the scale's type, keeps a scale of 1. */
void num_fp8_minmax(const num_format *f, const float *w, num_group *g)
{
    float top = num_largest(w, f->group & ~7);
    for (int64_t i = f->group & ~7; i < f->group; i++) top = fabsf(w[i]) > top ? fabsf(w[i]) : top;
    float scale = num_rounded(top / 448.0f, f->scale_dtype);
    if (scale == 0) scale = 1;
    *g = (num_group){.scale = scale, .code_scale = scale};
}

/* metal multiplies by a reciprocal, which for a power of two is a division; the cpu graph of
 * nvfp4 divides. */
void num_scaled_codes(const num_format *f, const num_group *g, const float *w, int64_t n,
                      uint8_t *codes)
{
    float scale = g->code_scale, gain = g->code_bias;
    if (f->mode == NUM_FP8)
        for (int64_t i = 0; i < n; i++) codes[i] = fp_e4m3_encode(w[i] / scale);
    else if (f->mode == NUM_MXFP8)
        for (int64_t i = 0; i < n; i++) codes[i] = fp_e4m3_encode(w[i] * scale);
    else if (f->flavour == NUM_METAL)
        for (int64_t i = 0; i < n; i++) codes[i] = e2m1_even(w[i] * scale);
    else if (f->mode == NUM_MXFP4)
        for (int64_t i = 0; i < n; i++) codes[i] = e2m1_smaller(w[i] * scale);
    else
        for (int64_t i = 0; i < n; i++) codes[i] = e2m1_smaller(w[i] / scale * gain);
}
