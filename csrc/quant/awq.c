#include "quant/awq.h"

#include <float.h>
#include <math.h>

#include "num/fp.h"

/* Mean of the repeats of element (o, i). */
static float pooled(const float *x, awq_span span, int64_t o, int64_t i)
{
    double sum = 0;
    for (int64_t r = 0; r < span.repeat; r++) sum += x[(o * span.repeat + r) * span.inner + i];
    return (float)(sum / (double)span.repeat);
}

/* The least mean square that counts. */
static float floor_of(const float *s, int64_t n, awq_floor quiet)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += s[i];
    float least = (float)(sum / (double)n * quiet.share);
    if (!(least > quiet.least)) least = quiet.least;
    return least > FLT_MIN ? least : FLT_MIN;
}

void awq_scales(const float *importance, awq_span span, float alpha, float gain, awq_floor quiet,
                float *s)
{
    int64_t n = span.outer * span.inner;
    for (int64_t o = 0; o < span.outer; o++)
        for (int64_t i = 0; i < span.inner; i++)
            s[o * span.inner + i] = pooled(importance, span, o, i);
    float least = floor_of(s, n, quiet), low = FLT_MAX, high = 0;
    for (int64_t i = 0; i < n; i++) {
        s[i] = powf(s[i] > least ? s[i] : least, alpha / 2);
        low = s[i] < low ? s[i] : low;
        high = s[i] > high ? s[i] : high;
    }
    float middle = sqrtf(low) * sqrtf(high);
    for (int64_t i = 0; i < n; i++) {
        s[i] = s[i] / middle * gain;
        if (!isfinite(s[i]) || s[i] <= 0) s[i] = gain;
    }
}

void awq_spread(const float *s, awq_span span, float *out)
{
    for (int64_t o = 0; o < span.outer; o++)
        for (int64_t r = 0; r < span.repeat; r++)
            for (int64_t i = 0; i < span.inner; i++) *out++ = s[o * span.inner + i];
}

void awq_weights(const float *importance, const float *s, int64_t n, float share, float power,
                 float *out)
{
    double mean = 0;
    for (int64_t i = 0; i < n; i++) mean += importance[i];
    float rest = powf((float)(mean / (double)n), 1 - power) * share;
    for (int64_t i = 0; i < n; i++) {
        float x = power == 1 ? importance[i] * share : powf(importance[i], power) * rest;
        out[i] = s ? x / s[i] / s[i] : x;
    }
}

/* What a reader of the file has for a norm weight written with this scale. */
static float read_back(float norm, float scale, num_dtype dtype, float subtract)
{
    float x = norm * scale - subtract;
    if (dtype == NUM_DT_BF16) x = fp_bf16_decode(fp_bf16_encode(x));
    if (dtype == NUM_DT_F16) x = fp_f16_decode(fp_f16_encode(x));
    return x + subtract;
}

void awq_fold_norm(const float *norm, const float *s, int64_t n, num_dtype dtype, float subtract,
                   float *norm_scale, float *col_scale)
{
    for (int64_t i = 0; i < n; i++) {
        norm_scale[i] = 1 / s[i];
        col_scale[i] = norm[i] / read_back(norm[i], norm_scale[i], dtype, subtract);
        if (isfinite(col_scale[i]) && col_scale[i] > 0) continue;
        norm_scale[i] = 1;
        col_scale[i] = norm[i] / read_back(norm[i], 1, dtype, subtract);
        if (!isfinite(col_scale[i]) || col_scale[i] <= 0) col_scale[i] = 1;
    }
}
