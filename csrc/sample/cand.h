/* cand: the tokens still in the running, and the stages that narrow them.
 *
 * A cands is a workspace, loaded from one row of logits and then worked on by stages in any
 * order; ruled-out tokens (-inf) are not candidates. Probabilities are always those of the
 * candidates left: each stage works on the renormalised result of the one before. Logits are kept
 * in double, so that a stage's rounding does not move the threshold of the next.
 *
 * Candidates have positions 0..n-1, best first, equal logits by id. The order is made only as
 * deep as somebody looks: reading a position sorts that far, a vocabulary is never sorted for its
 * 20 best, nor for a stretch of it that only a sum of probabilities is wanted of. Most are not even
 * looked at one by one: they stay in `rest` until a stage asks for what is above its threshold.
 * cands_set leaves positions as they are until the next other stage, which begins by putting them
 * in order.
 *
 * Sums of probabilities run in double; of more than KERN_ROW_TERMS candidates the terms are f32,
 * as the logits are.
 *
 * What the stages mean follows the logits processors of Hugging Face transformers
 * (generation/logits_process.py), presence and frequency penalty OpenAI's formula. A cands
 * belongs to one thread; cands_load is the only function that allocates. */
#ifndef SAMPLE_CAND_H
#define SAMPLE_CAND_H

#include <stdint.h>

#include "base/err.h"
#include "kern/row.h"
#include "sample/heap.h"
#include "sample/rest.h"

/* Candidates are put into bins by how far they are from some logit: at first so many to a nat, the
 * last one without an end. */
enum { CANDS_BINS = 2048, CANDS_BINS_PER_NAT = 32 };

typedef struct cands {
    cand *list; /* [n_list]; the first n_sorted in order, all other candidates not before them */
    rest rest;  /* the other candidates */
    int64_t n, n_list, n_sorted, capacity;
    uint32_t *mark; /* [capacity] by id; zero between calls */
    int moved;      /* cands_set was called: the order no longer holds */
    int weighed;    /* max, z and away are those of the candidates */
    double max, z;  /* z = sum exp(logit - max) */
    double away;    /* sum (max - logit) exp(logit - max) */
    double mass[CANDS_BINS];
} cands;

/* {0} is a valid, empty workspace. */
void cands_close(cands *c);

/* All ids below n with a logit above -inf. Fails as sample_check does. */
err_code cands_load(cands *c, const kern_row_ops *ops, const float *logits, int64_t n, err_info *e);

/* Stages. Each leaves at least one candidate where there was one. */
void cands_temperature(cands *c, double t); /* logit / t; t = 0: the best alone */
void cands_top_k(cands *c, int64_t k);      /* none below the k-th best; ties stay; 0: off */
void cands_top_p(cands *c, double p);       /* those with less than p above them; 1: off */
void cands_min_p(cands *c, double p);       /* none below p times the best */
/* In order of |-ln p_i - entropy|, the shortest run with mass p, and ties with its last; 1: off.
 * Meister et al., Locally Typical Sampling. */
void cands_typical(cands *c, double p);

/* Ids may repeat and may be no candidates. */
/* Every id in ids once: logit / r where positive, else logit * r. */
void cands_repetition(cands *c, const int32_t *ids, int64_t n_ids, double r);
/* logit - count * frequency - presence, for ids that occur. */
void cands_penalty(cands *c, const int32_t *ids, int64_t n_ids, double presence, double frequency);
/* logit + x[i] for ids[i]; of repeated ids the last counts. */
void cands_bias(cands *c, const int32_t *ids, const double *x, int64_t n_ids);

/* Exactly the k best, ties cut by id. */
void cands_keep(cands *c, int64_t k);
/* Those whose flag is not 0; flags[n] by position. */
void cands_filter(cands *c, const char *flags);

/* The candidate at a position < n. */
const cand *cands_at(cands *c, int64_t position);
double cands_p(cands *c, int64_t position);
double cands_entropy(cands *c);
/* x < +inf; -inf rules the candidate out at the next stage. */
void cands_set(cands *c, int64_t position, double x);

/* Draws by probability with u in [0, 1): the first position whose cumulated mass reaches u. That
 * candidate alone is left. ERR_RANGE when there is none. */
err_code cands_pick(cands *c, double u, int32_t *id, err_info *e);

#endif
