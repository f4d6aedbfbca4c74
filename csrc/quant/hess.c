#include "quant/hess.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

/* Columns of a panel; rows of one that a thread takes; columns that `dots` does at once. */
enum { PANEL = 64, TILE = 32, STRIP = KERN_ROWS };

err_code hess_alloc(hess *h, int64_t n, err_info *e)
{
    *h = (hess){.n = n};
    h->order = mem_array((size_t)n, sizeof *h->order, e);
    if (h->order) h->cost = mem_array((size_t)n, sizeof *h->cost, e);
    if (h->cost) h->matrix = mem_array((size_t)n, (size_t)n * sizeof *h->matrix, e);
    if (h->matrix) h->feedback = mem_array((size_t)n, (size_t)n * sizeof *h->feedback, e);
    return h->feedback ? ERR_NONE : ERR_MEMORY;
}

void hess_free(hess *h)
{
    mem_free(h->order);
    mem_free(h->cost);
    mem_free(h->matrix);
    mem_free(h->feedback);
    *h = (hess){0};
}

typedef struct work {
    const hess *h;
    const hess_inputs *in;
    const kern_ops *ops;
    int64_t panel;
} work;

static void each(pool *p, int64_t n, int64_t grain, pool_fn fn, work *w)
{
    if (p)
        pool_for(p, n, grain, fn, w);
    else
        fn(w, 0, n, 0);
}

/* ---- H ------------------------------------------------------------------------------------- */

static void fill_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    const work *w = ctx;
    const hess_inputs *in = w->in;
    int64_t n = w->h->n;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        float *row = w->h->matrix + i * n;
        memcpy(row, in->sum + i * n * 4, (size_t)n * 4);
        if (in->col_scale)
            for (int64_t j = 0; j < n; j++) row[j] /= in->col_scale[i] * in->col_scale[j];
    }
}

/* Whether x = H_ij and y = H_ji can be sums of products. A column that is always 0 has products of
 * 0; `noise` is what rounding may make of them. */
static int are_products(float x, float y, float d_i, float d_j, float noise)
{
    if (!isfinite(x) || !isfinite(y)) return 0;
    if ((d_i == 0 || d_j == 0) && fabsf(x) > noise) return 0;
    return fabsf(x - y) <= 0x1p-10f * fabsf(x) + noise;
}

/* In tiles, as one of the two is read by columns. */
static int is_of_inputs(const hess *h, float mean)
{
    const float *H = h->matrix, noise = 0x1p-20f * mean;
    int64_t n = h->n;
    for (int64_t a = 0; a < n; a += TILE)
        for (int64_t b = 0; b <= a; b += TILE)
            for (int64_t i = a; i < a + TILE && i < n; i++)
                for (int64_t j = b; j < b + TILE && j <= i; j++)
                    if (!are_products(H[i * n + j], H[j * n + i], H[i * n + i], H[j * n + j],
                                      noise))
                        return 0;
    return 1;
}

typedef struct place {
    float diagonal;
    int32_t column;
} place;

static int by_falling_diagonal(const void *a, const void *b)
{
    const place *x = a, *y = b;
    if (x->diagonal != y->diagonal) return x->diagonal > y->diagonal ? -1 : 1;
    return x->column < y->column ? -1 : 1;
}

/* Fills order; returns the mean of the diagonal, NaN when it cannot be one. */
static float choose_order(hess *h)
{
    place *places = (place *)(void *)h->feedback; /* not needed yet; n >= 8 */
    double sum = 0;
    for (int64_t i = 0; i < h->n; i++) {
        places[i] = (place){h->matrix[i * h->n + i], (int32_t)i};
        if (!(places[i].diagonal >= 0)) return NAN;
        sum += places[i].diagonal;
    }
    qsort(places, (size_t)h->n, sizeof *places, by_falling_diagonal);
    for (int64_t i = 0; i < h->n; i++) h->order[i] = places[i].column;
    return (float)(sum / (double)h->n);
}

/* The lower triangle of H, last step first: its Cholesky factor L turned about the other diagonal
 * is R^T. */
static void gather_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    const work *w = ctx;
    int64_t n = w->h->n;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        float *row = w->h->feedback + i * n;
        const float *from = w->h->matrix + w->h->order[n - 1 - i] * n;
        for (int64_t j = 0; j <= i; j++) row[j] = from[w->h->order[n - 1 - j]];
        memset(row + i + 1, 0, (size_t)(n - 1 - i) * sizeof *row);
    }
}

/* ---- Cholesky ------------------------------------------------------------------------------- */

/* Columns [j, j + STRIP) of n_rows rows from `first` on, below the triangle of rows j: what the
 * columns before j leave of them, solved against that triangle. */
static void solve(const work *w, int64_t j, int64_t first, int64_t n_rows)
{
    int64_t n = w->h->n;
    float *L = w->h->feedback, sum[TILE * STRIP];
    w->ops->dots(L + j * n, n, STRIP, L + first * n, n, n_rows, j, sum, STRIP);
    for (int64_t r = 0; r < n_rows; r++) {
        float *row = L + (first + r) * n + j;
        for (int c = 0; c < STRIP; c++) {
            const float *triangle = L + (j + c) * n + j;
            float x = row[c] - sum[r * STRIP + c];
            for (int l = 0; l < c; l++) x = fmaf(-row[l], triangle[l], x);
            row[c] = x / triangle[c];
        }
    }
}

/* The triangle of rows j itself; 0 when a pivot is below `least`, or no number. */
static int factor_strip(const work *w, int64_t j, float least)
{
    int64_t n = w->h->n;
    float *L = w->h->feedback, sum[STRIP * STRIP];
    w->ops->dots(L + j * n, n, STRIP, L + j * n, n, STRIP, j, sum, STRIP);
    for (int r = 0; r < STRIP; r++) {
        float *row = L + (j + r) * n + j;
        for (int c = 0; c <= r; c++) {
            const float *other = L + (j + c) * n + j;
            float x = row[c] - sum[r * STRIP + c];
            for (int l = 0; l < c; l++) x = fmaf(-row[l], other[l], x);
            if (c < r)
                row[c] = x / other[c];
            else if (x >= least && x <= 0x1p126f)
                row[c] = sqrtf(x);
            else
                return 0;
        }
    }
    return 1;
}

static int64_t at_most(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void solve_tiles(void *ctx, int64_t begin, int64_t end, int worker)
{
    const work *w = ctx;
    int64_t below = at_most(w->panel + PANEL, w->h->n);
    (void)worker;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = below + t * TILE, n_rows = at_most(TILE, w->h->n - first);
        for (int64_t j = w->panel; j < below; j += STRIP) solve(w, j, first, n_rows);
    }
}

/* The lower triangle in place: left-looking, so that every entry is one dot product. 0 when a pivot
 * is below `least`. */
static int cholesky(work *w, float least, pool *p)
{
    int64_t n = w->h->n;
    for (w->panel = 0; w->panel < n; w->panel += PANEL) {
        int64_t below = at_most(w->panel + PANEL, n);
        for (int64_t j = w->panel; j < below; j += STRIP) {
            if (!factor_strip(w, j, least)) return 0;
            for (int64_t i = j + STRIP; i < below; i += TILE)
                solve(w, j, i, at_most(TILE, below - i));
        }
        each(p, (n - below + TILE - 1) / TILE, 1, solve_tiles, w);
    }
    return 1;
}

/* ---- the factor as it is used --------------------------------------------------------------- */

/* Entry (a, b) changes places with (n-1-b, n-1-a). */
static void turn(float *L, int64_t n)
{
    for (int64_t a = 0; a < n; a++)
        for (int64_t b = 0; b <= a && a + b < n - 1; b++) {
            float *other = L + (n - 1 - b) * n + n - 1 - a, x = L[a * n + b];
            L[a * n + b] = *other;
            *other = x;
        }
}

static void scale_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    const work *w = ctx;
    (void)worker;
    for (int64_t k = begin; k < end; k++) {
        float *row = w->h->feedback + k * w->h->n, pivot = row[k];
        for (int64_t j = 0; j < k; j++) row[j] /= pivot;
        row[k] = 1;
        w->h->cost[k] = pivot * pivot;
    }
}

/* Factors H, to whose diagonal `added` was added. */
static int factor(hess *h, float added, const kern_ops *ops, pool *p)
{
    work w = {.h = h, .ops = ops};
    each(p, h->n, TILE, gather_rows, &w);
    /* No pivot can be less than what was added. Where half of it is gone, the rest of the factor is
     * made of rounding too. */
    if (!cholesky(&w, added / 2, p)) return 0;
    turn(h->feedback, h->n);
    each(p, h->n, TILE, scale_rows, &w);
    return 1;
}

hess_state hess_factor(hess *h, const hess_inputs *in, const kern_ops *ops, pool *p)
{
    work w = {.h = h, .in = in};
    if (!(in->count >= 1)) return HESS_UNSEEN;
    each(p, h->n, TILE, fill_rows, &w);
    float mean = choose_order(h), share = (float)(0.01 + 0.1 * (double)h->n / in->count), added = 0;
    /* Beyond these bounds squares and quotients of what follows would leave f32. */
    if (!(mean <= 0x1p100f) || !is_of_inputs(h, mean)) return HESS_BROKEN;
    if (mean < 0x1p-100f) return HESS_LOST;
    for (; share <= 10 || added == 0; share *= 10) {
        float add = share * mean - added;
        for (int64_t i = 0; i < h->n; i++) h->matrix[i * h->n + i] += add;
        added += add;
        h->damping = share;
        if (factor(h, added, ops, p)) return HESS_READY;
    }
    return HESS_LOST;
}
