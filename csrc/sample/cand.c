#include "sample/cand.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "base/mem.h"
#include "sample/sample.h"

/* A temperature below this acts as 0: f32 logits divided by it would leave the range of double. */
static const double COLDEST = 1e-100;

void cands_close(cands *c)
{
    mem_pages_free(c->list, (size_t)(c->capacity + 1) * sizeof *c->list);
    mem_pages_free(c->mark, (size_t)(c->capacity + 1) * sizeof *c->mark);
    rest_close(&c->rest);
    *c = (cands){0};
}

/* Pages: of the list hardly any is ever touched. */
static err_code reserve(cands *c, int64_t n, err_info *e)
{
    size_t size = (size_t)n + 1; /* of a row that is in memory: what follows does not overflow */
    if (n <= c->capacity) return ERR_NONE;
    cands_close(c);
    cand *list = mem_pages(size * sizeof *list, e);
    uint32_t *mark = list ? mem_pages(size * sizeof *mark, e) : NULL;
    if (!mark) {
        mem_pages_free(list, size * sizeof *list);
        return ERR_MEMORY;
    }
    c->list = list;
    c->mark = mark;
    c->capacity = n;
    return ERR_NONE;
}

err_code cands_load(cands *c, const kern_row_ops *ops, const float *logits, int64_t n, err_info *e)
{
    kern_row_found found;
    c->n = c->n_list = c->n_sorted = 0;
    c->moved = c->weighed = 0;
    rest_drop(&c->rest);
    if (n <= 0) return sample_refuse(logits, n, e);
    err_code code = reserve(c, n, e);
    if (!code) code = rest_load(&c->rest, ops, logits, n, &found, e);
    if (!code && (found.is_bad || !found.n_live)) {
        rest_drop(&c->rest);
        code = sample_refuse(logits, n, e);
    }
    if (code) return code;
    c->n = found.n_live;
    if (c->n <= KERN_ROW_TERMS) c->n_list = rest_take_all(&c->rest, c->list);
    return ERR_NONE;
}

/* ---- order ------------------------------------------------------------------------------- */

static int in_order(const cand *list, int64_t n)
{
    for (int64_t i = 1; i < n; i++)
        if (cand_before(&list[i], &list[i - 1])) return 0;
    return 1;
}

static void sort(cand *list, int64_t n)
{
    if (in_order(list, n)) return;
    heap_make(list, n);
    heap_sort(list, n);
}

/* Puts the first k in order at the front: a heap of k, offered all others, then sorted in place.
 * n log k at worst, and n comparisons when k is small, which it nearly always is. */
static void order(cands *c, int64_t k)
{
    if (k > c->n) k = c->n;
    if (k <= c->n_sorted) return;
    c->n_list += rest_take_best(&c->rest, k - c->n_sorted, c->list + c->n_list);
    cand *heap = c->list + c->n_sorted;
    int64_t m = k - c->n_sorted, n = c->n_list - c->n_sorted;
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

const cand *cands_at(cands *c, int64_t position)
{
    return walk(c, position);
}

void cands_set(cands *c, int64_t position, double x)
{
    walk(c, position);
    c->list[position].logit = x;
    c->moved = 1;
    c->weighed = 0;
}

/* Nothing is left but the first n of the list. */
static void cut(cands *c, int64_t n)
{
    if (n == c->n) return;
    rest_drop(&c->rest);
    c->n = c->n_list = n;
    if (c->n_sorted > n) c->n_sorted = n;
    c->weighed = 0;
}

/* Keeps of the list those for which flags[i], or without flags logit >= floor, and of the rest
 * nothing. */
static void compact(cands *c, const char *flags, double floor)
{
    int64_t n = 0, n_sorted = 0;
    for (int64_t i = 0; i < c->n_list; i++) {
        if (flags ? !flags[i] : !(c->list[i].logit >= floor)) continue;
        n_sorted += i < c->n_sorted;
        c->list[n++] = c->list[i];
    }
    c->n_sorted = n_sorted;
    cut(c, n);
}

/* Those that cands_set or a bias ruled out are in the list. */
static void settle(cands *c)
{
    if (!c->moved) return;
    int64_t n = 0;
    for (int64_t i = 0; i < c->n_list; i++)
        if (c->list[i].logit >= -DBL_MAX) c->list[n++] = c->list[i];
    c->n -= c->n_list - n;
    c->n_list = n;
    c->moved = c->weighed = 0;
    c->n_sorted = 0;
}

/* ---- probabilities ----------------------------------------------------------------------- */

static double best(const cands *c)
{
    double max = rest_top(&c->rest);
    for (int64_t i = 0; i < c->n_list; i++)
        if (c->list[i].logit > max) max = c->list[i].logit;
    return max;
}

static double term(const cands *c, int64_t i)
{
    double logit = c->list[i].logit;
    return logit > -INFINITY ? exp(logit - c->max) : 0;
}

/* Terms of up to KERN_ROW_TERMS of the list from `first` on, and the distances in them; returns
 * how many. */
static int64_t terms_from(const cands *c, int64_t first, float *below, float *terms)
{
    int64_t n = c->n_list - first < KERN_ROW_TERMS ? c->n_list - first : KERN_ROW_TERMS;
    for (int64_t i = 0; i < KERN_ROW_TERMS; i++) {
        double d = i < n ? c->max - c->list[first + i].logit : KERN_ROW_FAR;
        below[i] = d < KERN_ROW_FAR ? (float)d : KERN_ROW_FAR;
    }
    c->rest.ops->terms(below, terms);
    return n;
}

static int are_many(const cands *c)
{
    return c->n > KERN_ROW_TERMS;
}

static void weigh_list(cands *c)
{
    float below[KERN_ROW_TERMS], terms[KERN_ROW_TERMS];
    for (int64_t i = 0, n; i < c->n_list; i += n) {
        n = terms_from(c, i, below, terms);
        for (int64_t j = 0; j < n; j++) {
            double x = are_many(c) ? terms[j] : term(c, i + j);
            c->z += x;
            if (x > 0) c->away += x * (c->max - c->list[i + j].logit);
        }
    }
}

static void weigh(cands *c)
{
    if (c->weighed) return;
    c->max = best(c);
    c->z = c->away = 0;
    weigh_list(c);
    rest_sums(&c->rest, c->max, &c->z, &c->away);
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

/* -sum p ln p with -ln p = max - logit + ln z. */
double cands_entropy(cands *c)
{
    if (!c->n) return 0;
    weigh(c);
    return log(c->z) + c->away / c->z;
}

/* ---- runs of a mass ---------------------------------------------------------------------- */

/* What a search has come to: those nearest to `centre` whose mass reaches `wanted` are list[0, lo),
 * which have `mass`, and some of list[lo, hi). Bins are by distance from `from` on. */
typedef struct search {
    double centre, wanted, mass, from, per_unit;
    int64_t lo, hi;
} search;

static double distance(const search *s, double logit)
{
    return fabs(logit - s->centre);
}

static int bin_of(const search *s, double logit)
{
    double bin = (distance(s, logit) - s->from) * s->per_unit;
    return bin < 1 ? 0 : bin < CANDS_BINS - 1 ? (int)bin : CANDS_BINS - 1;
}

static void fill_bins(cands *c, const search *s, int64_t first, int64_t end)
{
    float below[KERN_ROW_TERMS], terms[KERN_ROW_TERMS];
    for (int64_t i = first, n; i < end; i += n) {
        n = terms_from(c, i, below, terms);
        if (n > end - i) n = end - i;
        for (int64_t j = 0; j < n; j++)
            c->mass[bin_of(s, c->list[i + j].logit)] += are_many(c) ? terms[j] : term(c, i + j);
    }
}

/* The bin in which the mass is reached, or the last of n_bins with any; mass of those before it is
 * added to s->mass. -1: not reached, nor is this all. */
static int find_bin(const cands *c, search *s, int n_bins, int is_all)
{
    double mass = s->mass, before = mass;
    int last = 0;
    for (int i = 0; i < n_bins; i++) {
        if (c->mass[i] == 0) continue;
        before = mass;
        mass += c->mass[last = i];
        if (mass >= s->wanted) break;
    }
    if ((mass < s->wanted || mass == 0) && !is_all) return -1;
    s->mass = before;
    return last;
}

/* [lo, hi) becomes what is in `bin`; what was before it is in front, what was behind it is lost.
 * What was all in one bin stays in the order it had. Without branches, which could not be
 * predicted. */
static void part_at(cands *c, search *s, int bin)
{
    cand *list = c->list;
    int64_t n = s->lo, before = s->lo;
    for (int64_t i = s->lo; i < s->hi; i++) {
        cand x = list[i];
        list[n] = x;
        n += bin_of(s, x.logit) <= bin;
    }
    for (int64_t i = s->lo; i < n; i++) {
        cand x = list[i];
        list[i] = list[before];
        list[before] = x;
        before += bin_of(s, x.logit) < bin;
    }
    s->lo = before;
    s->hi = n;
}

/* The rest comes in from around the centre, as much as it takes. */
static void search_rest(cands *c, search *s)
{
    enum { STEP = 2 }; /* nats */
    int64_t first = 0;
    int bin;
    memset(c->mass, 0, sizeof c->mass);
    s->per_unit = CANDS_BINS_PER_NAT;
    for (int reach = STEP;; reach += STEP) {
        int n_bins = reach * CANDS_BINS_PER_NAT;
        if (n_bins < CANDS_BINS)
            c->n_list +=
                rest_take(&c->rest, s->centre - reach, s->centre + reach, c->list + c->n_list);
        else
            c->n_list += rest_take_all(&c->rest, c->list + c->n_list);
        fill_bins(c, s, first, c->n_list);
        first = c->n_list;
        bin = find_bin(c, s, c->rest.n_live ? n_bins : CANDS_BINS, !c->rest.n_live);
        if (bin >= 0) break;
    }
    s->hi = c->n_list;
    part_at(c, s, bin);
}

/* Of those between lo and hi that are not all equally far, a bin is always a part. */
static int search_nearer(cands *c, search *s)
{
    double near = INFINITY, far = 0;
    for (int64_t i = s->lo; i < s->hi; i++) {
        double d = distance(s, c->list[i].logit);
        if (d < near) near = d;
        if (d > far) far = d;
    }
    s->from = near;
    s->per_unit = CANDS_BINS / (far - near);
    if (!(s->per_unit < DBL_MAX)) return 0;
    memset(c->mass, 0, sizeof c->mass);
    fill_bins(c, s, s->lo, s->hi);
    part_at(c, s, find_bin(c, s, CANDS_BINS, 1));
    return 1;
}

/* The shortest run of those nearest to centre whose mass reaches p, at least one, or all that have
 * a mass: leaves it in front, in any order, and returns its length. The candidates are weighed. To
 * both sides of centre, equally near ones belong to it too; from the best down it is cut by id, and
 * the one that reaches p comes last. */
static int64_t run_of_mass(cands *c, double centre, int both, double p)
{
    enum { FEW = 64 };
    search s = {.centre = centre, .wanted = p * c->z, .hi = c->n_list};
    if (c->n > FEW) search_rest(c, &s);
    while (s.hi - s.lo > FEW && search_nearer(c, &s)) continue;
    cand *list = c->list;
    c->n_sorted = 0;
    sort(list + s.lo, s.hi - s.lo);
    int64_t from = s.lo;
    while (both && from < s.hi && list[from].logit >= centre) from++;
    int64_t to = from;
    double reach = 0;
    for (;;) {
        double above = from > s.lo ? list[from - 1].logit - centre : INFINITY;
        double below = to < s.hi ? centre - list[to].logit : INFINITY;
        double nearest = above <= below ? above : below;
        if (nearest == INFINITY) break;
        if (from < to && s.mass >= s.wanted && !(both && nearest <= reach)) break;
        s.mass += term(c, above <= below ? --from : to++);
        reach = nearest;
    }
    memmove(list + s.lo, list + from, (size_t)(to - from) * sizeof *list);
    return s.lo + to - from;
}

/* ---- stages ------------------------------------------------------------------------------ */

void cands_keep(cands *c, int64_t k)
{
    settle(c);
    if (k >= c->n) return;
    order(c, k);
    cut(c, k);
}

void cands_filter(cands *c, const char *flags)
{
    order(c, c->n);
    compact(c, flags, 0);
}

/* x / a / b is not x / (a b). */
void cands_temperature(cands *c, double t)
{
    settle(c);
    if (t < COLDEST) {
        cands_keep(c, 1);
        return;
    }
    if (c->rest.divisor != 1) c->n_list += rest_take_all(&c->rest, c->list + c->n_list);
    for (int64_t i = 0; i < c->n_list; i++) c->list[i].logit /= t;
    c->rest.divisor = t;
    c->weighed = 0;
}

void cands_top_k(cands *c, int64_t k)
{
    settle(c);
    if (k < 1 || k >= c->n) return;
    order(c, k);
    double last = c->list[k - 1].logit;
    int64_t n = k;
    for (int64_t i = k; i < c->n_list; i++)
        if (c->list[i].logit == last) cand_swap(&c->list[n++], &c->list[i]);
    cut(c, n);
}

void cands_top_p(cands *c, double p)
{
    settle(c);
    if (p >= 1 || !c->n) return;
    weigh(c);
    cut(c, run_of_mass(c, c->max, 0, p));
}

void cands_min_p(cands *c, double p)
{
    settle(c);
    if (p <= 0 || !c->n) return;
    double floor = best(c) + log(p);
    c->n_list += rest_take(&c->rest, floor, INFINITY, c->list + c->n_list);
    compact(c, NULL, floor);
}

/* |-ln p_i - entropy| = |logit_i - centre| */
void cands_typical(cands *c, double p)
{
    settle(c);
    if (p >= 1 || !c->n) return;
    double entropy = cands_entropy(c);
    cut(c, run_of_mass(c, c->max + log(c->z) - entropy, 1, p));
}

/* ---- stages that know ids ---------------------------------------------------------------- */

static int known(const cands *c, int32_t id)
{
    return id >= 0 && id < c->capacity;
}

static void fetch(cands *c, const int32_t *ids, int64_t n_ids)
{
    for (int64_t i = 0; i < n_ids; i++)
        c->n_list += rest_take_id(&c->rest, ids[i], c->list + c->n_list);
}

static void mark_counts(cands *c, const int32_t *ids, int64_t n_ids)
{
    fetch(c, ids, n_ids);
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
    for (int64_t i = 0; i < c->n_list; i++) {
        double *logit = &c->list[i].logit;
        if (c->mark[c->list[i].id]) *logit = *logit > 0 ? *logit / r : *logit * r;
    }
    unmark(c, ids, n_ids);
}

void cands_penalty(cands *c, const int32_t *ids, int64_t n_ids, double presence, double frequency)
{
    settle(c);
    mark_counts(c, ids, n_ids);
    for (int64_t i = 0; i < c->n_list; i++) {
        uint32_t count = c->mark[c->list[i].id];
        if (count) c->list[i].logit -= count * frequency + presence;
    }
    unmark(c, ids, n_ids);
}

void cands_bias(cands *c, const int32_t *ids, const double *x, int64_t n_ids)
{
    settle(c);
    fetch(c, ids, n_ids);
    for (int64_t i = 0; i < n_ids; i++)
        if (known(c, ids[i])) c->mark[ids[i]] = (uint32_t)i + 1;
    for (int64_t i = 0; i < c->n_list; i++) {
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
    weigh(c);
    int64_t at = run_of_mass(c, c->max, 0, u) - 1;
    /* rounding may leave the mass short of u: not a reason to draw what cannot be drawn */
    while (at > 0 && probability(c, at) == 0) at--;
    *id = c->list[at].id;
    c->list[0] = c->list[at];
    c->n_sorted = 1;
    cut(c, 1);
    return ERR_NONE;
}
