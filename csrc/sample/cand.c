#include "sample/cand.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "base/mem.h"
#include "sample/sample.h"
#include "sample/terms.h"

/* A temperature below this acts as 0: f32 logits divided by it would leave the range of double. */
static const double COLDEST = 1e-100;

void cands_close(cands *c)
{
    mem_free(c->list);
    mem_free(c->mark);
    *c = (cands){0};
}

err_code cands_load(cands *c, const float *logits, int64_t n, err_info *e)
{
    c->n = c->n_sorted = 0;
    c->moved = c->weighed = 0;
    err_code code = sample_check(logits, n, e);
    if (code) return code;
    if (n > c->capacity) {
        cands_close(c);
        c->list = mem_array((size_t)n, sizeof *c->list, e);
        c->mark = mem_array((size_t)n, sizeof *c->mark, e);
        if (!c->list || !c->mark) {
            cands_close(c);
            return ERR_MEMORY;
        }
        c->capacity = n;
    }
    c->divisor = 1;
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++) {
        c->list[m] = (cand){logits[i], (int32_t)i};
        m += logits[i] > -INFINITY;
    }
    c->n = m;
    return ERR_NONE;
}

/* ---- order ------------------------------------------------------------------------------- */

/* Puts the first k in order at the front: a heap of k, offered all others, then sorted in place.
 * n log k at worst, and n comparisons when k is small, which it nearly always is. */
static void order(cands *c, int64_t k)
{
    if (k > c->n) k = c->n;
    if (k <= c->n_sorted) return;
    cand *heap = c->list + c->n_sorted;
    int64_t m = k - c->n_sorted, n = c->n - c->n_sorted;
    heap_make(heap, m);
    for (int64_t i = m; i < n; i++)
        if (cand_before(&heap[i], &heap[0])) {
            cand_swap(&heap[i], &heap[0]);
            heap_sift(heap, m);
        }
    heap_sort(heap, m);
    c->n_sorted = k;
}

/* Sorts in growing strides, so that walking down the list costs little more than one sort. */
static const cand *walk(cands *c, int64_t position)
{
    while (position >= c->n_sorted) order(c, c->n_sorted < 64 ? 64 : 8 * c->n_sorted);
    return &c->list[position];
}

/* Not before somebody looks: most candidates do not live that long. */
static void divide(cands *c)
{
    if (c->divisor == 1) return;
    for (int64_t i = 0; i < c->n; i++) c->list[i].logit /= c->divisor;
    c->divisor = 1;
}

const cand *cands_at(cands *c, int64_t position)
{
    divide(c);
    return walk(c, position);
}

void cands_set(cands *c, int64_t position, double x)
{
    divide(c);
    walk(c, position);
    c->list[position].logit = x;
    c->moved = 1;
    c->weighed = 0;
}

/* Keeps the candidates for which flags[i], or without flags logit >= floor. */
static void compact(cands *c, const char *flags, double floor)
{
    int64_t n = 0, n_sorted = 0;
    for (int64_t i = 0; i < c->n; i++) {
        if (flags ? !flags[i] : !(c->list[i].logit >= floor)) continue;
        n_sorted += i < c->n_sorted;
        c->list[n++] = c->list[i];
    }
    if (n != c->n) c->weighed = 0;
    c->n = n;
    c->n_sorted = n_sorted;
}

static void settle_order(cands *c)
{
    if (!c->moved) return;
    c->moved = 0;
    c->n_sorted = 0;
    compact(c, NULL, -DBL_MAX);
}

static void settle(cands *c)
{
    divide(c);
    settle_order(c);
}

/* ---- probabilities ----------------------------------------------------------------------- */

static float below_best(const cands *c, int64_t i)
{
    return terms_below((float)(c->max - c->list[i].logit));
}

static int bin_of(float below)
{
    float bin = below * CANDS_BINS_PER_NAT;
    return bin < CANDS_BINS - 1 ? (int)bin : CANDS_BINS - 1;
}

static double term(const cands *c, int64_t i)
{
    double logit = c->list[i].logit;
    return logit > -INFINITY ? exp(logit - c->max) : 0;
}

/* Of many the terms are f32. */
static void weigh(cands *c)
{
    divide(c);
    if (c->weighed) return;
    c->max = -INFINITY;
    for (int64_t i = 0; i < c->n; i++)
        if (c->list[i].logit > c->max) c->max = c->list[i].logit;
    memset(c->mass, 0, sizeof c->mass);
    for (int64_t i = 0; i < c->n; i += TERMS) {
        int64_t n = c->n - i < TERMS ? c->n - i : TERMS;
        float below[TERMS], terms[TERMS];
        for (int64_t j = 0; j < TERMS; j++) below[j] = j < n ? below_best(c, i + j) : TERMS_FAR;
        terms_of(below, terms);
        for (int64_t j = 0; j < n; j++)
            c->mass[bin_of(below[j])] += c->n > TERMS ? terms[j] : term(c, i + j);
    }
    c->z = 0;
    for (int i = CANDS_BINS; i-- > 0;) c->z += c->mass[i];
    c->weighed = 1;
}

static double probability(const cands *c, int64_t i)
{
    double x = term(c, i);
    return x > 0 ? x / c->z : 0;
}

double cands_p(cands *c, int64_t position)
{
    walk(c, position);
    weigh(c);
    return probability(c, position);
}

double cands_entropy(cands *c)
{
    weigh(c);
    double sum = 0;
    for (int64_t i = 0; i < c->n; i++) {
        double p = probability(c, i);
        if (p > 0) sum += p * (c->list[i].logit - c->max);
    }
    return c->n ? log(c->z) - sum : 0;
}

/* Those in bins before `bin` to the front, which returns their number, and those in it behind
 * them, of which *n are. What was in order stays so. */
static int64_t part_at(cands *c, int bin, int64_t *n)
{
    int64_t before = 0, in = 0;
    for (int64_t i = 0; i < c->n; i++) {
        int b = bin_of(below_best(c, i));
        if (b > bin) continue;
        cand_swap(&c->list[before + in], &c->list[i]);
        if (b == bin) {
            in++;
            continue;
        }
        cand_swap(&c->list[before], &c->list[before + in]);
        before++;
    }
    if (c->n_sorted > before) c->n_sorted = before;
    *n = in;
    return before;
}

/* The length of the shortest run from the top whose mass reaches p, at least 1, or of all that have
 * a mass. Its last member is in its place, those before it are in any order. */
static int64_t run_of_mass(cands *c, double p)
{
    weigh(c);
    double mass = 0, wanted = p * c->z;
    int bin = 0, last = 0;
    for (int i = 0; i < CANDS_BINS; i++)
        if (c->mass[i] > 0) last = i;
    while (bin < last && mass + c->mass[bin] < wanted) mass += c->mass[bin++];
    int64_t n, i = 0, before = part_at(c, bin, &n);
    cand *list = c->list + before;
    heap_make(list, n);
    heap_sort(list, n);
    if (c->n_sorted == before) c->n_sorted += n;
    do mass += term(c, before + i++);
    while (i < n && mass < wanted);
    return before + i;
}

/* ---- stages ------------------------------------------------------------------------------ */

static void cut(cands *c, int64_t n)
{
    if (n >= c->n) return;
    c->n = n;
    if (c->n_sorted > n) c->n_sorted = n;
    c->weighed = 0;
}

void cands_keep(cands *c, int64_t k)
{
    settle_order(c);
    if (k >= c->n) return;
    order(c, k);
    cut(c, k);
}

void cands_filter(cands *c, const char *flags)
{
    compact(c, flags, 0);
}

void cands_temperature(cands *c, double t)
{
    settle(c);
    if (t < COLDEST) {
        cands_keep(c, 1);
        return;
    }
    c->divisor = t;
    if (t != 1) c->weighed = 0;
}

void cands_top_k(cands *c, int64_t k)
{
    settle_order(c);
    if (k <= 0 || k >= c->n) return;
    order(c, k);
    double last = c->list[k - 1].logit;
    int64_t n = k;
    for (int64_t i = k; i < c->n; i++)
        if (c->list[i].logit == last) cand_swap(&c->list[n++], &c->list[i]);
    cut(c, n);
}

void cands_top_p(cands *c, double p)
{
    settle(c);
    if (p >= 1 || !c->n) return;
    cut(c, run_of_mass(c, p));
}

void cands_min_p(cands *c, double p)
{
    settle(c);
    if (p <= 0 || !c->n) return;
    weigh(c);
    compact(c, NULL, c->max + log(p));
}

void cands_typical(cands *c, double p)
{
    settle(c);
    if (p >= 1 || !c->n) return;
    /* |-ln p_i - entropy| = |logit_i - centre|: the run is a stretch [lo, hi) of the sorted list
     * around the centre, and grows at whichever end is nearer. */
    double entropy = cands_entropy(c);
    double centre = c->max + log(c->z) - entropy;
    int64_t hi = 0;
    while (hi < c->n && walk(c, hi)->logit >= centre) hi++;
    int64_t lo = hi;
    double mass = 0, reach = 0;
    for (;;) {
        double above = lo > 0 ? c->list[lo - 1].logit - centre : INFINITY;
        double below = hi < c->n ? centre - walk(c, hi)->logit : INFINITY;
        double nearest = above <= below ? above : below;
        if (nearest == INFINITY || (lo < hi && mass >= p && nearest > reach)) break;
        mass += probability(c, above <= below ? --lo : hi++);
        reach = nearest;
    }
    for (int64_t i = lo; i < hi; i++) c->list[i - lo] = c->list[i];
    if (lo) c->weighed = 0;
    c->n_sorted = hi - lo;
    cut(c, hi - lo);
}

/* ---- stages that know ids ---------------------------------------------------------------- */

static int known(const cands *c, int32_t id)
{
    return id >= 0 && id < c->capacity;
}

static void mark_counts(cands *c, const int32_t *ids, int64_t n_ids)
{
    for (int64_t i = 0; i < n_ids; i++)
        if (known(c, ids[i]) && c->mark[ids[i]] < UINT32_MAX) c->mark[ids[i]]++;
}

static void unmark(cands *c, const int32_t *ids, int64_t n_ids)
{
    for (int64_t i = 0; i < n_ids; i++)
        if (known(c, ids[i])) c->mark[ids[i]] = 0;
    c->n_sorted = 0;
    c->weighed = 0;
}

void cands_repetition(cands *c, const int32_t *ids, int64_t n_ids, double r)
{
    settle(c);
    mark_counts(c, ids, n_ids);
    for (int64_t i = 0; i < c->n; i++) {
        double *logit = &c->list[i].logit;
        if (c->mark[c->list[i].id]) *logit = *logit > 0 ? *logit / r : *logit * r;
    }
    unmark(c, ids, n_ids);
}

void cands_penalty(cands *c, const int32_t *ids, int64_t n_ids, double presence, double frequency)
{
    settle(c);
    mark_counts(c, ids, n_ids);
    for (int64_t i = 0; i < c->n; i++) {
        uint32_t count = c->mark[c->list[i].id];
        if (count) c->list[i].logit -= count * frequency + presence;
    }
    unmark(c, ids, n_ids);
}

void cands_bias(cands *c, const int32_t *ids, const double *x, int64_t n_ids)
{
    settle(c);
    for (int64_t i = 0; i < n_ids; i++)
        if (known(c, ids[i])) c->mark[ids[i]] = (uint32_t)i + 1;
    for (int64_t i = 0; i < c->n; i++) {
        uint32_t at = c->mark[c->list[i].id];
        if (at) c->list[i].logit += x[at - 1];
    }
    unmark(c, ids, n_ids);
    c->moved = 1; /* a bias may be -inf */
    settle(c);
}

/* ---- the draw ---------------------------------------------------------------------------- */

err_code cands_pick(cands *c, double u, int32_t *id, err_info *e)
{
    settle(c);
    if (!c->n) return err_set(e, ERR_RANGE, "no candidate is left");
    int64_t at = run_of_mass(c, u) - 1;
    /* rounding may leave the mass short of u: not a reason to draw what cannot be drawn */
    while (at > 0 && probability(c, at) == 0) at--;
    *id = c->list[at].id;
    c->list[0] = c->list[at];
    c->n_sorted = 1;
    cut(c, 1);
    return ERR_NONE;
}
