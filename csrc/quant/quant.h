/* quant: rows of stored matrices, converted or encoded, into a checkpoint file.
 *
 * No policy: what becomes of a tensor is decided in Lua and arrives as a quant_job. Work is cut
 * into blocks of rows that threads take independently; a block's rows are the only weights held in
 * memory, so memory is bounded by threads, not by tensors. */
#ifndef QUANT_QUANT_H
#define QUANT_QUANT_H

#include "base/err.h"
#include "base/pool.h"
#include "base/cancel.h"
#include "io/st.h"
#include "kern/kern.h"
#include "num/fit.h"
#include "num/format.h"
#include "num/matrix.h"

typedef enum quant_op {
    QUANT_COPY,   /* the stored elements, of any dtype */
    QUANT_BF16,   /* each element rounded to bf16 */
    QUANT_F32,    /* each element as f32 */
    QUANT_ENCODE, /* rows in `format` */
} quant_op;

/* part_rows rows of a stored matrix. All pointers are borrowed; vectors may be NULL: scales of 1,
 * inputs that all count the same. */
typedef struct quant_part {
    num_matrix matrix;
    int opaque;              /* no numbers: rows of row_bytes bytes, for QUANT_COPY alone */
    const char *name, *file; /* for error texts */
    int64_t first_row;
    const float *importance; /* [cols] mean squares of the inputs that the written columns meet */
    const float *weights;    /* [cols] what errors count in quant_damage */
    const float *col_scale;  /* [cols] */
    const float *row_scale;  /* [part_rows] */
} quant_part;

/* What the inputs of a tensor's columns were like, as quant/calib.h writes it; borrowed. */
typedef struct quant_hessian {
    const st_tensor *sums;   /* F32 [cols][cols], or [n][cols][cols]: each of 1/n of the rows, or
                                [n][cols/n][cols/n]: the blocks of a diagonal, each of 1/n of the
                                columns, among which alone errors are made up for */
    const st_tensor *counts; /* I64 [n] inputs in each; 0: those rows or columns go without */
    int64_t expert;          /* the matrix for all rows; -1: one after the other */
} quant_hessian;

/* One output tensor: the rows of its parts, one part after the other. What is written is
 *     (w + add) * row_scale * col_scale - subtract
 * each step in f32. A norm that is stored as w - 1 becomes a plain one by adding 1, and is scaled
 * where it lies by adding and subtracting it. QUANT_COPY changes nothing: no scales, no shifts, and
 * takes plain elements only. QUANT_ENCODE takes over codes and scales that lie in the very format
 * already, unless something changes the weights: to encode them again can only lose. `exact` also
 * takes over what only differs in how a bias is stored (a float, or a zero point times the scale)
 * if every bias has that form, and nvfp4 codes whatever the divisor, which is the caller's to
 * write. */
typedef struct quant_job {
    quant_op op;
    float add, subtract;
    const quant_part *parts; /* [n_parts] borrowed */
    int64_t n_parts, part_rows, cols;
    num_format format;              /* QUANT_ENCODE: the format, */
    num_fit fit;                    /* the choice of scales (importance counts with NUM_FIT_MSE), */
    const quant_hessian *hessian;   /* error feedback, or NULL, */
    int64_t *n_lost;                /* how many of its matrices no damping saves is added here:
                                       their rows go without. Or NULL, */
    const kern_ops *ops;            /* and whose arithmetic that has; it does not change a bit */
    int exact;                      /* codes are taken over or refused, never encoded */
    int64_t weight, scales, biases; /* entries of the writer; -1 where there is none. Under
                                       format.zero_point the last takes num_zeros_pack's words */
} quant_job;

/* Runs one job and puts its bytes into `w`. A weight that is not finite or that the output cannot
 * hold is ERR_FORMAT naming tensor, row and column (the first one, whatever the number of
 * threads); parts beyond their matrix are ERR_RANGE, and so is a Hessian of other columns. `cancel`
 * is looked at between groups of blocks. */
err_code quant_run(const quant_job *job, st_writer *w, pool *p, const cancel_flag *cancel,
                   err_info *e);

/* The work of quant_run on the first max_rows rows, writing nothing: what it takes, and whether it
 * succeeds. */
err_code quant_try(const quant_job *job, int64_t max_rows, pool *p, const cancel_flag *cancel,
                   err_info *e);

/* The largest magnitude of what quant_run would encode; nothing is written. */
err_code quant_largest(const quant_job *job, pool *p, const cancel_flag *cancel, float *largest,
                       err_info *e);

/* Sums over weights w and what they become, in the units of the outputs without row_scale:
 * weight of the column (1 without) times the square of the difference, and of w. */
typedef struct quant_loss {
    double error, size;
} quant_loss;

/* What QUANT_ENCODE would lose, from about max_rows rows, evenly spaced, into losses[n_parts];
 * nothing is written. The sums are the same for every number of threads. */
err_code quant_damage(const quant_job *job, int64_t max_rows, pool *p, const cancel_flag *cancel,
                      quant_loss *losses, err_info *e);

/* The weights that quant_run would round, into out[n_parts * part_rows][cols]: for vectors, on the
 * calling thread. */
err_code quant_values(const quant_job *job, float *out, err_info *e);

#endif
