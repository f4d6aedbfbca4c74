/* rest: the logits of a row that no stage has looked at one by one yet.
 *
 * They stay in f32, in the order of ids, with the largest of each block, so that those above a
 * threshold are found without a look at all others. */
#ifndef SAMPLE_REST_H
#define SAMPLE_REST_H

#include <stdint.h>

#include "base/err.h"
#include "kern/row.h"
#include "sample/heap.h"

typedef struct rest {
    const kern_row_ops *ops;
    float *x;       /* [n] by id; -inf: ruled out, or taken */
    float *tops;    /* the largest of each KERN_ROW_BLOCK of x */
    int64_t n;      /* ids */
    int64_t n_live; /* of these above -inf */
    int64_t capacity;
    double divisor; /* a logit is x / divisor */
} rest;

/* {0} is valid and empty. */
void rest_close(rest *r);

/* Only this allocates, and only for more logits than before. The logits need not be checked: what
 * *found says of them decides whether the content means anything. */
err_code rest_load(rest *r, const kern_row_ops *ops, const float *logits, int64_t n,
                   kern_row_found *found, err_info *e);

/* The largest logit; -inf when there is none. */
double rest_top(const rest *r);

/* exp(logit - top) over all, and with weighted also (top - logit) exp(logit - top), are added. No
 * logit is above top. */
void rest_sums(const rest *r, double top, double *sum, double *weighted);

/* Moves logits into list, by rising id, and returns how many; list has room for all there are and
 * one. */
int64_t rest_take_all(rest *r, cand *list);
/* All from low to high, and perhaps some beyond, by as much as f32 rounds. */
int64_t rest_take(rest *r, double low, double high, cand *list);
/* All that are not below the k-th best of them. */
int64_t rest_take_best(rest *r, int64_t k, cand *list);
/* One of that id, or none. */
int64_t rest_take_id(rest *r, int32_t id, cand *list);

void rest_drop(rest *r);

#endif
