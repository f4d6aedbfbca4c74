#include "sample/sample.h"

#include <math.h>

err_code sample_check(const float *logits, int64_t n, err_info *e)
{
    int bad = 0, live = 0; /* no early exit: this way the loop is vectorised */
    for (int64_t i = 0; i < n; i++) {
        bad |= !(logits[i] < INFINITY);
        live |= logits[i] > -INFINITY;
    }
    if (!bad && live) return ERR_NONE;
    for (int64_t i = 0; i < n; i++)
        if (!(logits[i] < INFINITY))
            return err_set(e, ERR_RANGE, "logits are %s at id %lld",
                           isnan(logits[i]) ? "NaN" : "+inf", (long long)i);
    return err_set(e, ERR_RANGE, n ? "no token is left: all logits are -inf" : "no logits");
}

static int64_t best(const float *logits, int64_t n)
{
    int64_t at = 0;
    for (int64_t i = 1; i < n; i++)
        if (logits[i] > logits[at]) at = i;
    return at;
}

err_code sample_argmax(const float *logits, int64_t n, int32_t *id, err_info *e)
{
    err_code code = sample_check(logits, n, e);
    if (code) return code;
    *id = (int32_t)best(logits, n);
    return ERR_NONE;
}

err_code sample_topk(const float *logits, int64_t n, int64_t k, cand *list, int64_t *n_found,
                     err_info *e)
{
    *n_found = 0;
    err_code code = sample_check(logits, n, e);
    if (code || k <= 0) return code;
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++) {
        if (logits[i] == -INFINITY) continue;
        if (m < k) {
            list[m++] = (cand){logits[i], (int32_t)i};
            if (m == k) heap_make(list, k);
        } else if (logits[i] > list[0].logit) { /* an equal one has a higher id: not better */
            list[0] = (cand){logits[i], (int32_t)i};
            heap_sift(list, k);
        }
    }
    if (m < k) heap_make(list, m);
    heap_sort(list, m);
    *n_found = m;
    return ERR_NONE;
}

/* sum exp(l - max) and, weighted with those terms, sum (l - max); the terms are f32, which is as
 * good as the logits are. Differences are taken in double: two logits may be 6e38 apart. */
static void sums(const float *logits, int64_t n, double max, double *z, double *weighted)
{
    double sum = 0, w = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = logits[i] - max;
        if (d < -103) continue; /* exp is 0 in f32 */
        double term = expf((float)d);
        sum += term;
        w += term * d;
    }
    *z = sum;
    *weighted = w;
}

err_code sample_logprob(const float *logits, int64_t n, int32_t id, double *logprob, err_info *e)
{
    err_code code = sample_check(logits, n, e);
    if (code) return code;
    double max = logits[best(logits, n)], z, weighted;
    sums(logits, n, max, &z, &weighted);
    *logprob = logits[id] - max - log(z); /* in this order: max may be too large to add to */
    return ERR_NONE;
}

err_code sample_entropy(const float *logits, int64_t n, double *entropy, err_info *e)
{
    err_code code = sample_check(logits, n, e);
    if (code) return code;
    double z, weighted;
    sums(logits, n, logits[best(logits, n)], &z, &weighted);
    *entropy = log(z) - weighted / z; /* -sum p ln p with ln p = d - ln z */
    return ERR_NONE;
}
