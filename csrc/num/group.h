/* group: what the files of this room share about one group of one format. Inside num only.
 *
 * w: [f->group] weights, finite and below the limit of num_encode_row; codes: [f->group], one per
 * byte. */
#ifndef NUM_GROUP_H
#define NUM_GROUP_H

#include "num/fit.h"

enum { NUM_MAX_GROUP = 128 }; /* of all modes but fp8 */

/* The f32 that is stored as `dtype`. */
float num_rounded(float x, num_dtype dtype);

/* The scale (and bias) of MLX's rule. */
void num_affine_minmax(const num_format *f, const float *w, num_group *g);
void num_mx_minmax(const num_format *f, const float *w, num_group *g);
void num_nvfp4_minmax(const num_format *f, const float *w, num_group *g);
void num_fp8_minmax(const num_format *f, const float *w, num_group *g);

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

#endif
