/* Affine groups: w = scale * code + bias with codes 0 .. 2^bits - 1. Sources: mlx/backend/cpu/
 * quantized.cpp and mlx/backend/metal/kernels/quantized.h (affine_quantize); for zero points
 * compressed_tensors/quantization/utils/helpers.py. */
#include "num/fp.h"
#include "num/group.h"

static float at_least(float x, float floor)
{
    return x > floor ? x : floor;
}

/* One bit has a rule of its own: the codes are the two ends of the range. Otherwise the end of
 * larger magnitude becomes the bias and is code 0, and the scale is stretched so that 0.0 is a
 * code too: zeros, the most frequent weights of a pruned matrix, stay zero. */
static void fit(const num_format *f, float lo, float hi, float *scale, float *bias)
{
    if (f->bits == 1) {
        *scale = at_least(hi - lo, 1e-7f);
        *bias = lo;
        return;
    }
    float s = at_least((hi - lo) / (float)((1 << f->bits) - 1), 1e-7f);
    float end = lo;
    if (fabsf(lo) <= fabsf(hi)) {
        s = -s;
        end = hi;
    }
    float zero = f->flavour == NUM_METAL ? roundf(end / s) : rintf(end / s);
    *scale = zero != 0 ? end / zero : s;
    *bias = zero != 0 ? end : 0;
}

/* Zero is a code, the zero point z, and w = scale * (code - z). In the middle, the larger side
 * decides, and is half a step beyond the largest code if it is the positive one. */
static void fit_zero_point(const num_format *f, float lo, float hi, num_group *g)
{
    float top = (float)((1 << f->bits) - 1), middle = (float)(1 << (f->bits - 1));
    lo = lo < 0 ? lo : 0;
    hi = hi > 0 ? hi : 0;
    float half = hi > -lo ? hi : -lo;
    float step = f->zero_point == NUM_ZP_SYMMETRIC ? half / (top / 2) : (hi - lo) / top;
    float s = num_rounded(at_least(step, 1e-7f), f->scale_dtype);
    float zero = f->zero_point == NUM_ZP_SYMMETRIC ? middle : rintf(-lo / s);
    num_zero_point_group(s, zero < top ? zero : top, g);
}

void num_zero_point_group(float scale, float zero, num_group *g)
{
    *g = (num_group){scale, -(scale * zero), .code_scale = scale, .code_bias = zero};
}

void num_affine_minmax(const num_format *f, const float *w, num_group *g)
{
    float lo, hi;
    num_range(w, f->group, &lo, &hi);
    *g = (num_group){0};
    if (f->zero_point) {
        fit_zero_point(f, lo, hi, g);
        return;
    }
    if (f->flavour == NUM_METAL && hi < 0) hi = 0; /* its running maximum starts there */
    fit(f, lo, hi, &g->code_scale, &g->code_bias);
    g->scale = num_rounded(g->code_scale, f->scale_dtype);
    g->bias = num_rounded(g->code_bias, f->scale_dtype);
}

void num_affine_codes(const num_format *f, const num_group *g, const float *w, int64_t n,
                      uint8_t *codes)
{
    float s = g->code_scale, b = g->code_bias, top = (float)((1 << f->bits) - 1);
    if (f->zero_point) {
        /* The quotients are rounded before the zero point is added, as readers and stock writers
         * have them. */
        for (int64_t i = 0; i < n; i++) {
            float t = w[i] / s + 0x1.8p23f - 0x1.8p23f + b; /* the adder rounds to even */
            t = t > 0 ? t : 0;
            codes[i] = (uint8_t)(t < top ? t : top);
        }
        return;
    }
    /* Clamping before the rounding gives the same codes and keeps the conversions defined. */
    if (f->flavour == NUM_METAL) {
        for (int64_t i = 0; i < n; i++) {
            float t = (w[i] - b) / s;
            t = t > 0 ? t : 0;
            t = t < top ? t : top;
            int code = (int)t; /* t + 0.5 would round up the float just below one half */
            codes[i] = (uint8_t)(code + (t - (float)code >= 0.5f));
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            float t = (w[i] - b) / s;
            t = t > 0 ? t : 0;
            t = t < top ? t : top;
            codes[i] = (uint8_t)(int)(t + 0x1p23f - 0x1p23f); /* the adder rounds to even */
        }
    }
}
