#include "sample/sample.h"

#include <math.h>

#include "sample/terms.h"

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

/* The maximum in eight chains, then where it is. */
static int64_t best(const float *logits, int64_t n)
{
    enum { CHAINS = 8 };
    float top[CHAINS], max = -INFINITY;
    int64_t i = 0;
    for (int j = 0; j < CHAINS; j++) top[j] = -INFINITY;
    for (; i + CHAINS <= n; i += CHAINS)
        for (int j = 0; j < CHAINS; j++) top[j] = logits[i + j] > top[j] ? logits[i + j] : top[j];
    for (int j = 0; j < CHAINS; j++) max = top[j] > max ? top[j] : max;
    for (; i < n; i++) max = logits[i] > max ? logits[i] : max;
    for (i = 0; logits[i] != max; i++) continue;
    return i;
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

/* Distances from max of logits i on, of which n are left. */
static void distances(const float *logits, int64_t n, float max, float *below)
{
    for (int64_t i = 0; i < TERMS; i++) below[i] = i < n ? terms_below(max - logits[i]) : TERMS_FAR;
}

/* ln sum exp(l - max). */
static double log_sum(const float *logits, int64_t n, float max)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i += TERMS) {
        float below[TERMS], terms[TERMS];
        distances(logits + i, n - i, max, below);
        terms_of(below, terms);
        sum += terms_sum(terms);
    }
    return log(sum);
}

err_code sample_logprob(const float *logits, int64_t n, int32_t id, double *logprob, err_info *e)
{
    err_code code = sample_check(logits, n, e);
    if (code) return code;
    float max = logits[best(logits, n)];
    /* in this order: max may be too large to add to, or to subtract from in f32 */
    *logprob = (double)logits[id] - max - log_sum(logits, n, max);
    return ERR_NONE;
}

err_code sample_entropy(const float *logits, int64_t n, double *entropy, err_info *e)
{
    err_code code = sample_check(logits, n, e);
    if (code) return code;
    float max = logits[best(logits, n)];
    double sum = 0, weighted = 0;
    for (int64_t i = 0; i < n; i += TERMS) {
        float below[TERMS], terms[TERMS];
        distances(logits + i, n - i, max, below);
        terms_of(below, terms);
        sum += terms_sum(terms);
        for (int j = 0; j < TERMS; j++) terms[j] *= below[j];
        weighted += terms_sum(terms);
    }
    *entropy = log(sum) + weighted / sum; /* -sum p ln p with ln p = -below - ln sum */
    return ERR_NONE;
}
