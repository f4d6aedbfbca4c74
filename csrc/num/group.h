/* group: what the files of this room share about one group of one format. Inside num only.
 *
 * w: [f->group] weights, finite and below the limit of num_encode_row; codes: [f->group], one per
 * byte. */
#ifndef NUM_GROUP_H
#define NUM_GROUP_H

#include "num/fit.h"
#include "num/fp.h"

enum { NUM_MAX_GROUP = 128 }; /* of all modes but fp8 */

/* A search has to beat MLX's rule by more than sums of f32 may be wrong. */
#define NUM_FIT_BETTER (1.0f - 0x1p-14f)

/* x rounded to f32, f16 or bf16. */
static inline float num_rounded(float x, num_dtype dtype)
{
    if (dtype == NUM_DT_F16) return fp_f16_decode(fp_f16_encode(x));
    return dtype == NUM_DT_BF16 ? fp_bf16_decode(fp_bf16_encode(x)) : x;
}

/* Independent lanes that compilers make vectors of; candidates of a search are one per lane. */
enum { NUM_FIT_LANES = 16 };
#define NUM_FIT_EACH for (int j = 0; j < NUM_FIT_LANES; j++)

/* Ends of w[n], n a multiple of 16. */
static inline void num_range(const float *w, int64_t n, float *lo, float *hi)
{
    float l[NUM_FIT_LANES], h[NUM_FIT_LANES];
    NUM_FIT_EACH
    {
        float low = w[j], high = w[j];
        for (int64_t i = j; i < n; i += NUM_FIT_LANES) {
            float a = w[i];
            low = a < low ? a : low;
            high = a > high ? a : high;
        }
        l[j] = low;
        h[j] = high;
    }
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) {
            l[j] = l[j + half] < l[j] ? l[j + half] : l[j];
            h[j] = h[j + half] > h[j] ? h[j + half] : h[j];
        }
    *lo = l[0];
    *hi = h[0];
}

/* Largest magnitude of w[n], n a multiple of 8. */
float num_largest(const float *w, int64_t n);

/* Whether any of x[n] is above 0. */
int num_any(const float *x, int64_t n);

/* importance[n], or NULL, into h[n] of which the largest is 1. Returns whether they differ. */
int num_importance(const float *importance, int64_t n, float *h);

/* The scale (and bias) of MLX's rule. */
void num_affine_minmax(const num_format *f, const float *w, num_group *g);
void num_mx_minmax(const num_format *f, const float *w, num_group *g);
void num_nvfp4_minmax(const num_format *f, const float *w, num_group *g);
void num_fp8_minmax(const num_format *f, const float *w, num_group *g);

/* qstream's choice, and how it rounds. */
void num_qstream_fit(num_fit fit, const float *w, const float *importance, num_group *g);
void num_qstream_codes(const num_group *g, const float *w, int64_t n, uint8_t *codes);

/* Everything in *g from what is stored: a scale byte, or an affine scale with its zero point. */
void num_zero_point_group(float scale, float zero, num_group *g);
void num_mx_group(uint8_t byte, num_group *g);
void num_nvfp4_group(const num_format *f, uint8_t byte, num_group *g);

/* Of stored biases. */
num_dtype num_format_bias_dtype(const num_format *f);

/* num_matrix.divisor of an nvfp4 format. */
float num_format_divisor(const num_format *f);

/* Codes of n weights of the group, n = 1 or, but in fp8, a multiple of 16. */
void num_affine_codes(const num_format *f, const num_group *g, const float *w, int64_t n,
                      uint8_t *codes);
void num_scaled_codes(const num_format *f, const num_group *g, const float *w, int64_t n,
                      uint8_t *codes);

/* Codes of mxfp4, mxfp8 and nvfp4 are those of w times this, but for roundings of nvfp4 in the cpu
 * flavour. */
float num_group_inverse(const num_format *f, const num_group *g);

#endif
