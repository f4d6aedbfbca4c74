/* quant: rows of stored tensors, converted or encoded, into a checkpoint file.
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
#include "num/format.h"

typedef enum quant_op {
    QUANT_COPY,          /* the stored bytes */
    QUANT_BF16,          /* each element rounded to bf16 */
    QUANT_BF16_PLUS_ONE, /* 1 + w rounded to bf16: a zero-centred norm made plain */
    QUANT_ENCODE,        /* rows in `format` */
} quant_op;

typedef struct quant_part {  /* part_rows rows of a stored tensor seen as [elements / cols][cols] */
    const st_tensor *tensor; /* BF16, F16 or F32; borrowed */
    int64_t first_row;
} quant_part;

typedef struct quant_job { /* one output tensor: the rows of its parts, one part after the other */
    quant_op op;
    const quant_part *parts; /* [n_parts] borrowed */
    int64_t n_parts, part_rows, cols;
    num_format format;              /* QUANT_ENCODE */
    int64_t weight, scales, biases; /* entries of the writer; -1 where there is none */
} quant_job;

/* Runs one job and puts its bytes into `w`. A weight that is not finite or that the output cannot
 * hold is ERR_FORMAT naming tensor, row and column (the first one, whatever the number of
 * threads); parts beyond their tensor are ERR_RANGE. `cancel` is looked at between groups of
 * blocks. */
err_code quant_run(const quant_job *job, st_writer *w, pool *p, const cancel_flag *cancel,
                   err_info *e);

#endif
