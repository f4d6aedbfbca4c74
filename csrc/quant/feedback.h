/* feedback: which rows of a job see which inputs.
 *
 * A tensor has one Hessian, or each of its experts has one; columns may be scaled part by part.
 * Rows that share a matrix and a scaling are a range and share a factor. */
#ifndef QUANT_FEEDBACK_H
#define QUANT_FEEDBACK_H

#include "quant/hess.h"
#include "quant/quant.h"

typedef struct feedback_range { /* rows [begin, end) of the output tensor */
    int64_t begin, end;
    hess_inputs inputs;
} feedback_range;

/* ERR_RANGE when the job's Hessian is none of its columns, naming tensor and sizes; ERR_UNSUPPORTED
 * when the columns are no multiple of KERN_ROWS, which rows of fp8 need not be. */
err_code feedback_check(const quant_job *job, err_info *e);

/* The range that begins at row `begin`. */
feedback_range feedback_range_at(const quant_job *job, int64_t begin);

/* ERR_FORMAT for a range whose matrix is broken. */
err_code feedback_broken(const quant_job *job, const feedback_range *range, err_info *e);

#endif
