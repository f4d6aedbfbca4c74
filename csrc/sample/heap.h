/* heap: the one order of candidates, and the heap that finds the first k in it.
 *
 * The root is the last in order, so that a better one can take its place. */
#ifndef SAMPLE_HEAP_H
#define SAMPLE_HEAP_H

#include <stdint.h>

typedef struct cand {
    double logit; /* < +inf */
    int32_t id;
} cand;

/* Higher logits first, equal ones by id. */
static inline int cand_before(const cand *a, const cand *b)
{
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static inline void cand_swap(cand *a, cand *b)
{
    cand t = *a;
    *a = *b;
    *b = t;
}

/* heap: [n]. Any n candidates become a heap; a heap whose root was replaced becomes one again; a
 * heap becomes a list in order. */
void heap_make(cand *heap, int64_t n);
void heap_sift(cand *heap, int64_t n);
void heap_sort(cand *heap, int64_t n);

#endif
