/* fit: how the scale (and bias) of a group is chosen, and encoding in steps.
 *
 * num_encode_row follows MLX: the range of a group decides. A fit may choose better values for the
 * same bytes. What a decoder computes does not depend on how scales were chosen.
 *
 * A caller that corrects weights while it encodes (error feedback) works with the pieces: scale
 * of a group from its weights, codes one at a time, and one row of codes packed at the end. Pure:
 * no allocation, no I/O; any thread. */
#ifndef NUM_FIT_H
#define NUM_FIT_H

#include "num/format.h"

typedef enum num_fit {
    NUM_FIT_MINMAX,       /* MLX's rule */
    NUM_FIT_MSE,          /* least squared error, weighted by importance if there is one; fp8, as
                             exact under one scale as under another, keeps its rule */
    NUM_FIT_QSTREAM,      /* mxfp4: the best of three exponents around the 99.5th percentile */
    NUM_FIT_QSTREAM_AMAX, /* ... around the largest magnitude */
    NUM_N_FITS
} num_fit;

/* One group under its scale. */
typedef struct num_group {
    float scale, bias;           /* what a decoder computes with: as stored; bias 0 unless affine */
    float code_scale, code_bias; /* what num_group_code divides by; MLX codes with the affine scale
                                    and bias before they are rounded for storage */
    uint8_t byte;                /* the stored scale of mxfp4, mxfp8 and nvfp4 */
    uint8_t qstream;             /* codes as qstream rounds: from bf16, ties to the smaller */
} num_group;

/* The searches of NUM_FIT_MSE. kern has them for each instruction set, with the same bits. */
typedef struct num_fit_ops {
    void (*affine)(const num_format *f, const float *w, const float *importance, num_group *g);
    void (*scaled)(const num_format *f, const float *w, const float *importance, num_group *g);
} num_fit_ops;

extern const num_fit_ops num_fit_plain;

/* ERR_UNSUPPORTED when the format does not know the fit. */
err_code num_fit_check(const num_format *f, num_fit fit, err_info *e);

/* Scale and bias for w[f->group], whose weights num_encode_row would take. importance:
 * [f->group], finite and not negative, or NULL; where it is all zeros all weights count the same.
 * ops: NULL for num_fit_plain. */
void num_group_fit(const num_format *f, num_fit fit, const num_fit_ops *ops, const float *w,
                   const float *importance, num_group *g);

/* From here on codes are chosen against the stored scale and bias: what error feedback wants, and
 * for groups from NUM_FIT_MINMAX not what MLX writes. */
void num_group_settle(const num_format *f, num_group *g);

/* The code of a weight of any size (beyond the range of codes: the code at its end), not NaN. */
uint8_t num_group_code(const num_format *f, const num_group *g, float w);

/* The bits that num_row_decode gives for the code. */
float num_group_value(const num_format *f, const num_group *g, uint8_t code);

/* One row from groups[cols / f->group] and codes[cols], one per byte; sizes as num_encode_row. */
void num_row_pack(const num_format *f, const num_group *groups, const uint8_t *codes, int64_t cols,
                  uint8_t *out, uint8_t *scales, uint8_t *biases);

/* num_encode_row with a fit: the bytes that num_group_fit, num_group_code for each weight and
 * num_row_pack give. importance: [cols] or NULL. Returns what num_encode_row does. */
int64_t num_fit_row(const num_format *f, num_fit fit, const num_fit_ops *ops, const float *row,
                    const float *importance, int64_t cols, uint8_t *codes, uint8_t *scales,
                    uint8_t *biases);

#endif
