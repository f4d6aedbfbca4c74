/* Least squared error for mxfp4, mxfp8 and nvfp4: the scale is one byte, and 16 of them around
 * MLX's are tried at once, one per lane. A file to be included, as fit_affine.h. */
#ifndef NUM_FIT_SCALED_H
#define NUM_FIT_SCALED_H

#include "num/group.h"

enum { BELOW = 11 }; /* of the bytes tried first: clipping may pay, wasting range hardly */

#define EACH  NUM_FIT_EACH
#define ROUND 0x1.8p23f

/* Nearest E2M1 value: steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6. */
static inline float nearest_e2m1(float y)
{
    float a = fabsf(y);
    float round = a < 2.0f ? ROUND / 2 : a < 4.0f ? ROUND : ROUND * 2;
    float r = a + round - round;
    return r < 6.0f ? r : 6.0f;
}

/* Nearest E4M3 value: 8 steps between powers of two, down to steps of 2^-9. In integers, which
 * order magnitudes as floats do: compilers make vectors of that. */
static inline float nearest_e4m3(float y)
{
    const uint32_t top = 0x43e00000u /* 448 */, least = 0x3c800000u /* 2^-6 */;
    uint32_t u = fp_bits(y) & 0x7fffffffu, power;
    u = u < top ? u : top;
    power = u & 0x7f800000u;
    power = power > least ? power : least;
    float a = fp_from_bits(u), round = fp_from_bits(power) * (ROUND / 8);
    return a + round - round;
}

typedef struct scales { /* codes are those of w * inverse, decoded with scale */
    float inverse[NUM_FIT_LANES], scale[NUM_FIT_LANES];
} scales;

/* error = sum of h ((w - decoded) gain)^2 */
static void e2m1_errors(const scales *in, const float *w, const float *h, int64_t n, float gain,
                        float *error)
{
    float sum[NUM_FIT_LANES] = {0};
    scales s = *in;
    for (int64_t i = 0; i < n; i++) EACH
        {
            float d = (fabsf(w[i]) - s.scale[j] * nearest_e2m1(w[i] * s.inverse[j])) * gain;
            sum[j] += h[i] * (d * d);
        }
    memcpy(error, sum, sizeof sum);
}

static void e4m3_errors(const scales *in, const float *w, const float *h, int64_t n, float gain,
                        float *error)
{
    float sum[NUM_FIT_LANES] = {0};
    scales s = *in;
    for (int64_t i = 0; i < n; i++) EACH
        {
            float d = (fabsf(w[i]) - s.scale[j] * nearest_e4m3(w[i] * s.inverse[j])) * gain;
            sum[j] += h[i] * (d * d);
        }
    memcpy(error, sum, sizeof sum);
}

static void group_of_byte(const num_format *f, uint8_t byte, num_group *g)
{
    if (f->mode == NUM_NVFP4)
        num_nvfp4_group(f, byte, g);
    else
        num_mx_group(byte, g);
}

/* Errors of the bytes first, first + 1, ... */
static void byte_errors(const num_format *f, const float *w, const float *h, float gain, int first,
                        float *error)
{
    scales s;
    EACH
    {
        num_group g;
        group_of_byte(f, (uint8_t)(first + j), &g);
        s.scale[j] = g.scale;
        s.inverse[j] = num_group_inverse(f, &g);
    }
    if (f->mode == NUM_MXFP8)
        e4m3_errors(&s, w, h, f->group, gain, error);
    else
        e2m1_errors(&s, w, h, f->group, gain, error);
}

static void scaled_mse(const num_format *f, const float *w, const float *importance, num_group *g)
{
    float h[NUM_MAX_GROUP], error[NUM_FIT_LANES], top = num_largest(w, f->group);
    if (f->mode == NUM_NVFP4)
        num_nvfp4_minmax(f, w, g);
    else
        num_mx_minmax(f, w, g);
    if (top < 0x1p-120f) return;
    num_importance(importance, f->group, h);
    int highest = f->mode == NUM_NVFP4 ? 0x7e : 254, best = g->byte;
    int first = best - BELOW > 0 ? best - BELOW : 0;
    if (first > highest - NUM_FIT_LANES + 1) first = highest - NUM_FIT_LANES + 1;
    byte_errors(f, w, h, 1.0f / top, first, error);
    float least = error[best - first] * NUM_FIT_BETTER;
    for (;;) {
        for (int j = 0; j < NUM_FIT_LANES; j++) {
            if (!(error[j] < least)) continue;
            least = error[j];
            best = first + j;
        }
        if (best != first || first == 0) break; /* else the error may fall further below */
        first = first > NUM_FIT_LANES ? first - NUM_FIT_LANES : 0;
        byte_errors(f, w, h, 1.0f / top, first, error);
    }
    group_of_byte(f, (uint8_t)best, g);
}

#undef ROUND
#undef EACH
#endif
