/* attn: gated attention with grouped queries and partial rotary positions (transformers'
 * Qwen3_5Attention).
 *
 *   q, gate = W_q u (per head: D query rows, then D gate rows);  k = W_k u;  v = W_v u
 *   q, k: RMS norm per head, then the first rotary_dim dims rotate by position, pairs (j, j+half)
 *   o = softmax(q k^T / sqrt(D)) v, causal;  y = W_o (o sigmoid(gate))
 *
 * Softmax runs over blocks of KERN_BLOCK positions, counted from the first of the sequence, whose
 * results are merged in rising order: the order of summation is the same for a prompt and for a
 * single token, whichever threads take which blocks. */
#include "model/pass.h"

#include <math.h>
#include <string.h>

/* ---- rotary positions ----------------------------------------------------------------------- */

void rope_prepare(pass *p, int64_t i, int64_t pos)
{
    const model_config *c = &p->m->config;
    int64_t half = c->rotary_dim / 2;
    for (int64_t j = 0; j < half; j++) {
        double angle = (double)pos * (double)c->inv_freq[j];
        p->cos[i * half + j] = (float)cos(angle) * c->rope_scale;
        p->sin[i * half + j] = (float)sin(angle) * c->rope_scale;
    }
}

static void rotate(float *x, const float *cosines, const float *sines, int64_t half)
{
    for (int64_t j = 0; j < half; j++) {
        float a = x[j], b = x[j + half];
        x[j] = a * cosines[j] - b * sines[j];
        x[j + half] = b * cosines[j] + a * sines[j];
    }
}

/* ---- queries, keys and values of a token ---------------------------------------------------- */

/* Rows of one span that meet each page of keys and values together. */
enum { TILE_ROWS = 8 };

typedef struct tile {
    const ses *s;
    int64_t first, n;          /* rows of the batch */
    int64_t pos;               /* of the first one */
    int64_t n_blocks;          /* that the last one sees */
    int64_t first_item, found; /* of its (head, block) pairs; of its results in p->found */
} tile;

typedef struct attn_loop {
    pass *p;
    const attn_weights *w;
    int slot;
    int64_t n, n_tiles;
    int64_t n_items, n_found; /* of all tiles */
    tile tiles[SES_BATCH];
} attn_loop;

static int64_t group_of(const pass *p)
{
    return p->m->config.n_heads / p->m->config.n_kv_heads;
}

/* Queries of row i that read head h of keys: [Nq/Nkv][D], and those of the rows after it. */
static float *queries_at(const attn_loop *l, int64_t h, int64_t i)
{
    return l->p->q + (h * l->n + i) * group_of(l->p) * l->p->m->config.head_dim;
}

/* The session and position of row i. */
static ses *row_place(const pass *p, int64_t i, int64_t *pos)
{
    const span *sp = p->row_span[i];
    *pos = sp->pos + (i - sp->first);
    return sp->s;
}

/* Norms and rotation of tokens [begin, end); their keys and values go into the cache. */
static void place_tokens(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const attn_loop *l = ctx;
    const pass *p = l->p;
    const model_config *c = &p->m->config;
    const kern_ops *ops = p->m->ops;
    int64_t D = c->head_dim, half = c->rotary_dim / 2, width = c->n_kv_heads * D, pos;
    int64_t group = group_of(p);

    for (int64_t i = begin; i < end; i++) {
        const float *cosines = p->cos + i * half, *sines = p->sin + i * half;
        for (int64_t h = 0; h < c->n_heads; h++) {
            float *q = queries_at(l, h / group, i) + h % group * D;
            ops->rms_norm(p->qg + (i * c->n_heads + h) * 2 * D, l->w->q_norm, D, c->rms_eps, q);
            rotate(q, cosines, sines, half);
        }
        for (int64_t h = 0; h < c->n_kv_heads; h++) {
            float *k = p->k + i * width + h * D;
            ops->rms_norm(k, l->w->k_norm, D, c->rms_eps, k);
            rotate(k, cosines, sines, half);
        }
        ses *s = row_place(p, i, &pos);
        kv_write(s, l->slot, pos, p->k + i * width, p->v + i * width);
    }
}

/* ---- softmax by blocks ---------------------------------------------------------------------- */

/* What the queries of a tile that read head h find in a block. Rows that see a part of it take
 * their own call; rows before it are left out. */
static void find(const attn_loop *l, const tile *t, int h, int64_t block, float *scores,
                 kern_found to)
{
    const model *m = l->p->m;
    int64_t D = m->config.head_dim, group = group_of(l->p), from = block * KERN_BLOCK;
    int64_t n_pages = kv_n_pages(t->pos + t->n);
    float scale = 1 / sqrtf((float)D);
    kern_kv kv = {.is_f16 = t->s->codec == KV_F16, .dim = D, .n = KERN_BLOCK};
    for (int64_t i = 0, page = from / KERN_PAGE; i < KERN_BLOCK_PAGES && page < n_pages;
         i++, page++) {
        int64_t next = page + KERN_BLOCK_PAGES;
        kv.keys[i] = kv_head(t->s, l->slot, KV_KEY, page, h);
        kv.values[i] = kv_head(t->s, l->slot, KV_VALUE, page, h);
        kv.next[i] = next < n_pages ? kv_head(t->s, l->slot, KV_KEY, next, h) : kv.keys[i];
    }
    if (from + KERN_BLOCK <= t->pos + 1) {
        m->ops->attend(&kv, queries_at(l, h, t->first), t->n * group, scale, scores, &to);
        return;
    }
    for (int64_t i = 0; i < t->n; i++) {
        int64_t sees = t->pos + i + 1 - from, q = i * group;
        if (sees <= 0) continue;
        kv.n = sees < KERN_BLOCK ? sees : KERN_BLOCK;
        kern_found own = {to.top + q, to.sum + q, to.out + q * D};
        m->ops->attend(&kv, queries_at(l, h, t->first + i), group, scale, scores, &own);
    }
}

/* exp(x - top), 0 where nothing was seen */
static float weight_of(float x, float top)
{
    return x == -INFINITY ? 0.0f : kern_expf(x - top);
}

/* One query's result so far, and another block's: always in rising order. */
static void merge(const kern_ops *ops, int64_t D, float top, float sum, const float *out,
                  float *top_so_far, float *sum_so_far, float *acc)
{
    float both = top > *top_so_far ? top : *top_so_far;
    float old = weight_of(*top_so_far, both), new = weight_of(top, both);
    *top_so_far = both;
    *sum_so_far = *sum_so_far * old + sum * new;
    ops->axpby(new, out, old, acc, D);
}

/* Query head `head` of row i, which has seen all: its share of the sum, its gate. */
static void finish(const pass *p, int64_t i, int64_t head, float sum)
{
    const model_config *c = &p->m->config;
    int64_t D = c->head_dim, at = i * c->n_heads + head;
    float *out = p->heads + at * D, factor = sum == 0 ? 0 : 1 / sum;
    for (int64_t d = 0; d < D; d++) out[d] *= factor;
    p->m->ops->sigmoid_mul(out, p->qg + at * 2 * D + D, D);
}

static float *start(const pass *p, int64_t i, int64_t head, float *top, float *sum)
{
    int64_t D = p->m->config.head_dim;
    float *acc = p->heads + (i * p->m->config.n_heads + head) * D;
    memset(acc, 0, (size_t)D * sizeof *acc);
    *top = -INFINITY;
    *sum = 0;
    return acc;
}

/* ---- many rows: a worker takes a tile through all blocks ------------------------------------ */

int64_t attn_work_floats(const model_config *c)
{
    int64_t rows = (int64_t)TILE_ROWS * (c->n_heads / c->n_kv_heads);
    return (rows * (KERN_BLOCK + c->head_dim + 4) + 15) / 16 * 16;
}

/* Items are (tile, head of keys) pairs. */
static void attend_tiles(void *ctx, int64_t begin, int64_t end, int worker)
{
    const attn_loop *l = ctx;
    const pass *p = l->p;
    const model_config *c = &p->m->config;
    int64_t D = c->head_dim, group = group_of(p), rows = TILE_ROWS * group;
    float *scores = p->attn_work + worker * attn_work_floats(c), *out = scores + rows * KERN_BLOCK;
    float *top = out + rows * D, *sum = top + rows, *found_top = sum + rows;
    kern_found found = {found_top, found_top + rows, out};

    for (int64_t item = begin; item < end; item++) {
        const tile *t = &l->tiles[item / c->n_kv_heads];
        int64_t h = item % c->n_kv_heads;
        for (int64_t q = 0; q < t->n * group; q++)
            start(p, t->first + q / group, h * group + q % group, &top[q], &sum[q]);
        for (int64_t b = 0; b < t->n_blocks; b++) {
            int64_t unseen = b * KERN_BLOCK - t->pos; /* rows before the block */
            find(l, t, (int)h, b, scores, found);
            for (int64_t q = unseen > 0 ? unseen * group : 0; q < t->n * group; q++) {
                int64_t at = (t->first + q / group) * c->n_heads + h * group + q % group;
                merge(p->m->ops, D, found.top[q], found.sum[q], out + q * D, &top[q], &sum[q],
                      p->heads + at * D);
            }
        }
        for (int64_t q = 0; q < t->n * group; q++)
            finish(p, t->first + q / group, h * group + q % group, sum[q]);
    }
}

/* ---- few rows: workers share the blocks ----------------------------------------------------- */

/* Results of head h and a block for the rows of a tile, in p->found. */
static kern_found found_at(const attn_loop *l, const tile *t, int64_t h, int64_t block)
{
    const pass *p = l->p;
    int64_t D = p->m->config.head_dim, all = p->n_found * group_of(p);
    int64_t at = (t->found + (h * t->n_blocks + block) * t->n) * group_of(p);
    float *top = p->found + all * D;
    return (kern_found){top + at, top + all + at, p->found + at * D};
}

static const tile *tile_of_item(const attn_loop *l, int64_t item)
{
    const tile *t = l->tiles + l->n_tiles - 1;
    while (t->first_item > item) t--;
    return t;
}

/* Items are (tile, head of keys, block) triples. */
static void find_blocks(void *ctx, int64_t begin, int64_t end, int worker)
{
    const attn_loop *l = ctx;
    float *scores = l->p->attn_work + worker * attn_work_floats(&l->p->m->config);
    for (int64_t item = begin; item < end; item++) {
        const tile *t = tile_of_item(l, item);
        int64_t h = (item - t->first_item) / t->n_blocks;
        int64_t block = (item - t->first_item) % t->n_blocks;
        find(l, t, (int)h, block, scores, found_at(l, t, h, block));
    }
}

/* Items are (row, query head) pairs. */
static void merge_blocks(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const attn_loop *l = ctx;
    const pass *p = l->p;
    const model_config *c = &p->m->config;
    int64_t group = group_of(p), D = c->head_dim;
    const tile *t = l->tiles;
    for (int64_t item = begin; item < end; item++) {
        int64_t i = item / c->n_heads, head = item % c->n_heads;
        while (i >= t->first + t->n) t++;
        int64_t n = (t->pos + i - t->first) / KERN_BLOCK + 1;
        int64_t q = (i - t->first) * group + head % group;
        float top, sum, *acc = start(p, i, head, &top, &sum);
        for (int64_t b = 0; b < n; b++) {
            kern_found from = found_at(l, t, head / group, b);
            merge(p->m->ops, D, from.top[q], from.sum[q], from.out + q * D, &top, &sum, acc);
        }
        finish(p, i, head, sum);
    }
}

/* ---- the mixer ------------------------------------------------------------------------------ */

int64_t attn_n_found(const model_config *c)
{
    int64_t blocks = ((int64_t)c->max_positions + KERN_BLOCK - 1) / KERN_BLOCK;
    return (blocks > SES_BATCH ? blocks : SES_BATCH) * c->n_kv_heads;
}

static void cut_tiles(attn_loop *l)
{
    const pass *p = l->p;
    int64_t n_heads = p->m->config.n_kv_heads;
    for (const span *sp = p->spans; sp < p->spans + p->n_spans; sp++)
        for (int64_t i = 0; i < sp->n; i += TILE_ROWS) {
            int64_t n = sp->n - i < TILE_ROWS ? sp->n - i : TILE_ROWS;
            int64_t n_blocks = (sp->pos + i + n - 1) / KERN_BLOCK + 1;
            l->tiles[l->n_tiles++] =
                (tile){sp->s, sp->first + i, n, sp->pos + i, n_blocks, l->n_items, l->n_found};
            l->n_items += n_heads * n_blocks;
            l->n_found += n_heads * n_blocks * n;
        }
}

/* Both ways give the same bits. The second keeps every block's results until all are there. */
static void attend(attn_loop *l)
{
    enum { PIECES_PER_THREAD = 4 }; /* enough to even out */
    const model_config *c = &l->p->m->config;
    pool *threads = l->p->m->pool;
    int64_t n_whole = l->n_tiles * c->n_kv_heads,
            wanted = PIECES_PER_THREAD * pool_n_threads(threads);
    if (pool_n_threads(threads) == 1 || n_whole >= wanted || l->n_items == n_whole ||
        l->n_found > l->p->n_found) {
        pool_for(threads, n_whole, 1, attend_tiles, l);
        return;
    }
    pool_for(threads, l->n_items, l->n_items / wanted, find_blocks, l);
    pool_for(threads, l->n * c->n_heads, 4, merge_blocks, l);
}

void attn_mix(pass *p, const attn_weights *w, int slot, int64_t n)
{
    const model_config *c = &p->m->config;
    int64_t H = c->hidden_size;
    attn_loop l = {.p = p, .w = w, .slot = slot, .n = n};
    kern_job jobs[] = {
        {&w->q_proj, p->u, p->qg, H, n, w->q_proj.rows},
        {&w->k_proj, p->u, p->k, H, n, w->k_proj.rows},
        {&w->v_proj, p->u, p->v, H, n, w->v_proj.rows},
    };
    pass_linear_jobs(p, PROFILE_QKV_PROJ, jobs, 3);
    /* Threads that wrote into the same page would pass its cache lines around. */
    pool_for(p->m->pool, n, KERN_PAGE, place_tokens, &l);
    cut_tiles(&l);
    attend(&l);
    pass_lap(p, PROFILE_ATTEND, p->kv_bytes);
    pass_show(p, TAP_MIXER_OUT, p->heads, n, w->o_proj.cols, NULL);
    pass_linear(p, PROFILE_O_PROJ, &w->o_proj, p->heads, n, p->y);
}
