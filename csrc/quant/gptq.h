/* gptq: rows encoded with error feedback.
 *
 * Scales are chosen first, group by group on the weights as they are, weighted by what an error of
 * each column costs once later columns have made up for it (hess.cost). Then columns are coded in
 * activation order, each from its weight and what the errors so far leave of them. Groups keep
 * their columns, so the result is an ordinary row of the format. Choosing scales on the way, on
 * corrected weights, as the paper does, rules out activation order across groups and is worse. */
#ifndef QUANT_GPTQ_H
#define QUANT_GPTQ_H

#include "num/fit.h"
#include "quant/hess.h"

/* Rows of one call: enough that the factor is read once for many of them. */
enum { GPTQ_ROWS = 32 };

typedef struct gptq_job { /* all borrowed */
    const hess *h;
    const kern_ops *ops;
    const num_format *format; /* checked for h->n columns */
    num_fit fit;
    const float *importance; /* [h->n] of the plain fit, or NULL */
} gptq_job;

/* Bytes that one call needs at a 64-byte boundary. */
int64_t gptq_scratch_bytes(const num_format *f, int64_t n);

/* rows[n_rows][n], n_rows <= GPTQ_ROWS, into arrays laid out as num_encode_row's, one row after the
 * other. A row whose plain fit (num_fit_row) costs less keeps it. Returns -1, or the
 * first row * n + column that has no encoding. */
int64_t gptq_encode(const gptq_job *job, const float *rows, int64_t n_rows, uint8_t *codes,
                    uint8_t *scales, uint8_t *biases, void *scratch);

#endif
