/* rows: the rows of a job's output, one at a time: where they come from, loaded, transformed,
 * rounded. Private to quant; no allocation, any thread. */
#ifndef QUANT_ROWS_H
#define QUANT_ROWS_H

#include <stddef.h>

#include "quant/quant.h"

/* Everything that the functions below take for granted; *n_rows of the output. */
err_code rows_check(const quant_job *job, int64_t *n_rows, err_info *e);

typedef struct rows_sizes { /* bytes of one output row; biases as encoded, zeros as packed */
    int64_t weight, scales, biases, zeros;
} rows_sizes;

rows_sizes rows_sizes_of(const quant_job *job);

/* Where an output row comes from: row `stored` of the matrix, row `row` of the part. */
typedef struct rows_place {
    const quant_part *part;
    int64_t row, stored;
} rows_place;

rows_place rows_find(const quant_job *job, int64_t row);

/* The stored bytes of its weights. */
const uint8_t *rows_codes(const rows_place *s);

/* The first of n that is not finite, or -1. */
int64_t rows_first_not_finite(const float *x, int64_t n);

/* The stored row as f32 into out[cols]; its first column that is not finite, or -1. */
int64_t rows_load(const rows_place *s, float *out);

/* Shifts and scales x[cols] as quant_job says. */
void rows_transform(const quant_job *job, const rows_place *s, float *x);

/* Do the part's rows lie as they are to be written? */
int rows_is_encoded(const quant_job *job, const quant_part *part);

/* x, the transformed row, into arrays of the sizes *out; the first column that they cannot hold, or
 * -1. Copies are not stored so. */
int64_t rows_store(const quant_job *job, const rows_sizes *out, const rows_place *s, const float *x,
                   uint8_t *weight, uint8_t *scales, uint8_t *biases);

/* Says that x, the weight in that column, cannot be written. */
err_code rows_bad_weight(const rows_place *s, int64_t column, float x, err_info *e);

/* Calls fn for the stored bytes of n rows, one part after the other. */
void rows_each_range(const quant_job *job, int64_t row, int64_t n,
                     void (*fn)(const void *data, size_t n_bytes));

#endif
