#include "sample/sample.h"

#include <math.h>
#include <stddef.h>

/* Rows are looked at in stretches, whose blocks' largest fit the stack. */
enum { BLOCKS = 256, STRETCH = BLOCKS * KERN_ROW_BLOCK };

err_code sample_refuse(const float *logits, int64_t n, err_info *e)
{
    for (int64_t i = 0; i < n; i++)
        if (!(logits[i] < INFINITY))
            return err_set(e, ERR_RANGE, "logits are %s at id %lld",
                           isnan(logits[i]) ? "NaN" : "+inf", (long long)i);
    return err_set(e, ERR_RANGE, n ? "no token is left: all logits are -inf" : "no logits");
}

/* The largest logit, and where the block begins that has it first. */
static err_code find_top(const kern_row_ops *ops, const float *logits, int64_t n, float *top,
                         int64_t *block, err_info *e)
{
    float tops[BLOCKS];
    int64_t n_live = 0;
    int is_bad = 0;
    *top = -INFINITY;
    *block = 0;
    for (int64_t i = 0; i < n; i += STRETCH) {
        int64_t m = n - i < STRETCH ? n - i : STRETCH;
        kern_row_found found = ops->scan(logits + i, m, tops);
        n_live += found.n_live;
        is_bad |= found.is_bad;
        for (int64_t b = 0; b * KERN_ROW_BLOCK < m; b++)
            if (tops[b] > *top) {
                *top = tops[b];
                *block = i + b * KERN_ROW_BLOCK;
            }
    }
    return is_bad || !n_live ? sample_refuse(logits, n, e) : ERR_NONE;
}

err_code sample_argmax(const kern_row_ops *ops, const float *logits, int64_t n, int32_t *id,
                       err_info *e)
{
    float top;
    int64_t i;
    err_code code = find_top(ops, logits, n, &top, &i, e);
    if (code) return code;
    while (logits[i] != top) i++;
    *id = (int32_t)i;
    return ERR_NONE;
}

/* Offers list, a heap once it is full, what is larger than its root; an equal logit has a higher
 * id. */
static int64_t offer(cand *list, int64_t m, int64_t k, float logit, int64_t id)
{
    if (m < k) {
        list[m++] = (cand){logit, (int32_t)id};
        if (m == k) heap_make(list, k);
    } else if (logit > list[0].logit) {
        list[0] = (cand){logit, (int32_t)id};
        heap_sift(list, k);
    }
    return m;
}

err_code sample_topk(const kern_row_ops *ops, const float *logits, int64_t n, int64_t k, cand *list,
                     int64_t *n_found, err_info *e)
{
    float tops[BLOCKS];
    int64_t m = 0;
    int is_bad = 0;
    *n_found = 0;
    for (int64_t i = 0; i < n && k > 0; i += STRETCH) {
        int64_t end = n - i < STRETCH ? n : i + STRETCH;
        is_bad |= ops->scan(logits + i, end - i, tops).is_bad;
        for (int64_t at = i, b = 0; at < end; at += KERN_ROW_BLOCK, b++) {
            if (m == k && !(tops[b] > list[0].logit)) continue;
            for (int64_t j = at; j < end && j < at + KERN_ROW_BLOCK; j++)
                if (logits[j] > -INFINITY) m = offer(list, m, k, logits[j], j);
        }
    }
    if (is_bad || !m) return sample_refuse(logits, n, e);
    if (m < k) heap_make(list, m);
    heap_sort(list, m);
    *n_found = m;
    return ERR_NONE;
}

err_code sample_logprob(const kern_row_ops *ops, const float *logits, int64_t n, int32_t id,
                        double *logprob, err_info *e)
{
    float top;
    int64_t block;
    double sum = 0;
    err_code code = find_top(ops, logits, n, &top, &block, e);
    if (code) return code;
    ops->sums(logits, n, top, 1, &sum, NULL);
    /* in this order: top may be too large to add to */
    *logprob = (double)logits[id] - top - log(sum);
    return ERR_NONE;
}

err_code sample_entropy(const kern_row_ops *ops, const float *logits, int64_t n, double *entropy,
                        err_info *e)
{
    float top;
    int64_t block;
    double sum = 0, weighted = 0;
    err_code code = find_top(ops, logits, n, &top, &block, e);
    if (code) return code;
    ops->sums(logits, n, top, 1, &sum, &weighted);
    *entropy = log(sum) + weighted / sum; /* -sum p ln p with -ln p = d + ln sum */
    return ERR_NONE;
}
