/* feedback: which rows of a job see which inputs.
 *
 * A tensor has one Hessian, or each of its experts has one, or each block of its columns; columns
 * may be scaled part by part. Rows that share matrices and a scaling are a range and share their
 * factors. */
#ifndef QUANT_FEEDBACK_H
#define QUANT_FEEDBACK_H

#include "quant/hess.h"
#include "quant/quant.h"

typedef struct feedback_range { /* rows [begin, end) of the output tensor */
    int64_t begin, end;
    int64_t matrix;         /* the first for them */
    const float *col_scale; /* [cols] or NULL */
} feedback_range;

/* Blocks of columns, and columns of each: 1 and all where a Hessian is whole. */
int64_t feedback_blocks(const quant_job *job);
int64_t feedback_side(const quant_job *job);

/* ERR_RANGE when the job's Hessian is none of its columns, naming tensor and sizes; ERR_UNSUPPORTED
 * when the columns are no multiple of KERN_ROWS, which rows of fp8 need not be, or blocks cut a
 * group of the format. */
err_code feedback_check(const quant_job *job, err_info *e);

/* The range that begins at row `begin`. */
feedback_range feedback_range_at(const quant_job *job, int64_t begin);

/* What a block of its columns sees. */
hess_inputs feedback_inputs(const quant_job *job, const feedback_range *range, int64_t block);

/* ERR_FORMAT for a range of which a block's matrix is broken. */
err_code feedback_broken(const quant_job *job, const feedback_range *range, int64_t block,
                         err_info *e);

#endif
