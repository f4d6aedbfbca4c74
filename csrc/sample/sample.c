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

static int before(const float *logits, int32_t a, int32_t b)
{
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

/* Moves heap[at] down; the root is the worst of the heap. */
static void sift(const float *logits, int32_t *heap, int64_t n, int64_t at)
{
    int32_t id = heap[at];
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && before(logits, heap[child], heap[child + 1])) child++;
        if (before(logits, heap[child], id)) break;
        heap[at] = heap[child];
    }
    heap[at] = id;
}

err_code sample_topk(const float *logits, int64_t n, int64_t k, int32_t *ids, int64_t *n_found,
                     err_info *e)
{
    *n_found = 0;
    err_code code = sample_check(logits, n, e);
    if (code || k <= 0) return code;
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++) {
        if (logits[i] == -INFINITY) continue;
        if (m < k) {
            ids[m++] = (int32_t)i;
            if (m == k)
                for (int64_t at = k / 2; at-- > 0;) sift(logits, ids, k, at);
        } else if (logits[i] > logits[ids[0]]) { /* an equal one has a higher id: not better */
            ids[0] = (int32_t)i;
            sift(logits, ids, k, 0);
        }
    }
    if (m < k)
        for (int64_t at = m / 2; at-- > 0;) sift(logits, ids, m, at);
    for (int64_t left = m; left > 1;) {
        int32_t worst = ids[0];
        ids[0] = ids[--left];
        ids[left] = worst;
        sift(logits, ids, left, 0);
    }
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
