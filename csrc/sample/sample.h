/* sample: what can be asked of a row of logits, without changing it.
 *
 * logits: [n] f32, index = token id, borrowed. -inf means "ruled out" and is fine everywhere. NaN
 * and +inf have no probability: every question answers ERR_RANGE and names the first such id, as
 * it does when all entries are -inf. Equal logits are ordered by id. Sums run in double. Pure;
 * any thread. */
#ifndef SAMPLE_SAMPLE_H
#define SAMPLE_SAMPLE_H

#include <stdint.h>

#include "base/err.h"
#include "kern/row.h"
#include "sample/heap.h"

/* ERR_RANGE with the reason why logits, of which some are NaN or +inf or none is finite, are
 * refused. */
err_code sample_refuse(const float *logits, int64_t n, err_info *e);

err_code sample_argmax(const kern_row_ops *ops, const float *logits, int64_t n, int32_t *id,
                       err_info *e);

/* The best first into list[k]; *n_found <= k counts those that are not ruled out. */
err_code sample_topk(const kern_row_ops *ops, const float *logits, int64_t n, int64_t k, cand *list,
                     int64_t *n_found, err_info *e);

/* ln softmax(logits)[id]; id < n. */
err_code sample_logprob(const kern_row_ops *ops, const float *logits, int64_t n, int32_t id,
                        double *logprob, err_info *e);

/* Of softmax(logits), in nats. */
err_code sample_entropy(const kern_row_ops *ops, const float *logits, int64_t n, double *entropy,
                        err_info *e);

#endif
