/* group: one group of one format at a time; what num_encode_row is made of. Inside num only.
 *
 * w: [f->group] weights, finite and below 2^127; codes: [f->group], one per byte. */
#ifndef NUM_GROUP_H
#define NUM_GROUP_H

#include "num/format.h"

enum { NUM_MAX_GROUP = 128 };

/* Scale and bias are what the codes were made with; only under zero_point is the scale rounded to
 * f->scale_dtype already, as it has to be for the bias to be a multiple. */
void num_affine_group(const num_format *f, const float *w, uint8_t *codes, float *scale,
                      float *bias);

/* mxfp4 and mxfp8: returns the E8M0 scale byte. */
uint8_t num_mx_group(const num_format *f, const float *w, uint8_t *codes);

/* x rounded to f32, f16 or bf16. */
float num_rounded(float x, num_dtype dtype);

/* A whole row: returns its scale, rounded to f->scale_dtype. */
float num_fp8_row(const num_format *f, const float *w, int64_t cols, uint8_t *codes);

/* Returns the E4M3 scale byte. */
uint8_t num_nvfp4_group(const num_format *f, const float *w, uint8_t *codes);

#endif
