#include "sample/rest.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "base/mem.h"

static int64_t n_blocks(int64_t n)
{
    return (n + KERN_ROW_BLOCK - 1) / KERN_ROW_BLOCK;
}

void rest_close(rest *r)
{
    mem_free(r->x);
    mem_free(r->tops);
    *r = (rest){0};
}

err_code rest_load(rest *r, const kern_row_ops *ops, const float *logits, int64_t n,
                   kern_row_found *found, err_info *e)
{
    enum { STRETCH = 64 * KERN_ROW_BLOCK }; /* is copied while it is in the first-level cache */
    if (n > r->capacity) {
        rest_close(r);
        r->x = mem_array((size_t)n, sizeof *r->x, e);
        r->tops = mem_array((size_t)n_blocks(n), sizeof *r->tops, e);
        if (!r->x || !r->tops) {
            rest_close(r);
            return ERR_MEMORY;
        }
        r->capacity = n;
    }
    r->ops = ops;
    r->n = n;
    r->divisor = 1;
    *found = (kern_row_found){0};
    for (int64_t i = 0; i < n; i += STRETCH) {
        int64_t m = n - i < STRETCH ? n - i : STRETCH;
        kern_row_found here = ops->scan(logits + i, m, r->tops + i / KERN_ROW_BLOCK);
        memcpy(r->x + i, logits + i, (size_t)m * sizeof *r->x);
        found->n_live += here.n_live;
        found->is_bad |= here.is_bad;
    }
    r->n_live = found->n_live;
    return ERR_NONE;
}

static float top_of(const float *x, int64_t n)
{
    float top = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        if (x[i] > top) top = x[i];
    return top;
}

double rest_top(const rest *r)
{
    return r->n_live ? top_of(r->tops, n_blocks(r->n)) / r->divisor : -INFINITY;
}

void rest_sums(const rest *r, double top, double *sum, double *weighted)
{
    if (!r->n_live) return;
    /* Where the largest is one of these, its distance must be 0 whatever division rounds. */
    double own = top_of(r->tops, n_blocks(r->n));
    double from = own / r->divisor < top ? top * r->divisor : own;
    r->ops->sums(r->x, r->n, from, 1 / r->divisor, sum, weighted);
}

/* Those of a block from low to high; the block's largest is made anew. Without branches: which
 * logits are taken cannot be predicted. */
static int64_t take_of_block(rest *r, int64_t block, float low, float high, cand *list)
{
    int64_t first = block * KERN_ROW_BLOCK, n = 0;
    int64_t end = r->n - first < KERN_ROW_BLOCK ? r->n : first + KERN_ROW_BLOCK;
    for (int64_t i = first; i < end; i++) {
        list[n] = (cand){r->x[i], (int32_t)i};
        n += r->x[i] >= low && r->x[i] <= high;
    }
    for (int64_t i = first; i < end; i++)
        r->x[i] = r->x[i] >= low && r->x[i] <= high ? -INFINITY : r->x[i];
    for (int64_t i = 0; i < n; i++) list[i].logit /= r->divisor;
    if (n) r->tops[block] = top_of(r->x + first, end - first);
    return n;
}

/* low is above -inf. */
static int64_t take(rest *r, float low, float high, cand *list)
{
    int64_t n = 0, blocks = n_blocks(r->n);
    if (!r->n_live) return 0;
    for (int64_t b = 0; b < blocks; b++)
        if (r->tops[b] >= low) n += take_of_block(r, b, low, high, list + n);
    r->n_live -= n;
    return n;
}

int64_t rest_take_all(rest *r, cand *list)
{
    return take(r, -FLT_MAX, FLT_MAX, list);
}

static float within_floats(double x)
{
    return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : (float)x;
}

int64_t rest_take(rest *r, double low, double high, cand *list)
{
    float from = nextafterf(within_floats(low * r->divisor), -FLT_MAX);
    float to = nextafterf(within_floats(high * r->divisor), FLT_MAX);
    return take(r, from, to, list);
}

/* As many blocks have a largest one that is not below the k-th largest of these, so as many
 * logits are not below it. Of many it is not worth the search. */
int64_t rest_take_best(rest *r, int64_t k, cand *list)
{
    int64_t blocks = n_blocks(r->n), m = 0;
    if (k > blocks / 2) return rest_take_all(r, list);
    for (int64_t b = 0; b < blocks; b++) {
        cand top = {r->tops[b], (int32_t)b};
        if (r->tops[b] == -INFINITY) continue;
        if (m < k) {
            list[m++] = top;
            if (m == k) heap_make(list, k);
        } else if (cand_before(&top, &list[0])) {
            list[0] = top;
            heap_sift(list, k);
        }
    }
    return m < k ? rest_take_all(r, list) : take(r, (float)list[0].logit, FLT_MAX, list);
}

int64_t rest_take_id(rest *r, int32_t id, cand *list)
{
    if (!r->n_live || id < 0 || id >= r->n || r->x[id] == -INFINITY) return 0;
    float x = r->x[id];
    int64_t block = id / KERN_ROW_BLOCK, first = block * KERN_ROW_BLOCK;
    list[0] = (cand){x / r->divisor, id};
    r->x[id] = -INFINITY;
    if (x == r->tops[block])
        r->tops[block] =
            top_of(r->x + first, r->n - first < KERN_ROW_BLOCK ? r->n - first : KERN_ROW_BLOCK);
    r->n_live--;
    return 1;
}

void rest_drop(rest *r)
{
    r->n_live = 0;
}
