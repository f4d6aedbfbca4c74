/* attn: gated attention with grouped queries and partial rotary positions (transformers'
 * Qwen3_5Attention).
 *
 *   q, gate = W_q u (per head: D query rows, then D gate rows);  k = W_k u;  v = W_v u
 *   q, k: RMS norm per head, then the first rotary_dim dims rotate by position, pairs (j, j+half)
 *   o = softmax(q k^T / sqrt(D)) v, causal;  y = W_o (o sigmoid(gate))
 *
 * Softmax runs over blocks of KERN_BLOCK positions, counted from the first of the sequence, whose
 * results are merged in rising order: the order of summation is the same for a prompt and for a
 * single token, whichever threads take which blocks. Under precision fast a block is met in
 * integers (kern/int_attn.h). */
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
enum { TILE_ROWS = 8, RUN_TILES = 8, RUN_ROWS = TILE_ROWS * RUN_TILES };

typedef struct tile {
    const ses *s;
    int64_t first, n;          /* rows of the batch */
    int64_t pos;               /* of the first one */
    int64_t n_blocks;          /* that the last one sees */
    int64_t first_item, found; /* of its (head, block) pairs; of its results in p->found */
} tile;

/* Tiles of one span that a worker takes through the blocks together. */
typedef struct tile_run {
    const tile *first, *last;
} tile_run;

typedef struct attn_loop {
    pass *p;
    const attn_weights *w;
    int slot;
    int64_t n, n_tiles, n_runs;
    int64_t n_items, n_found; /* of all tiles */
    tile tiles[SES_BATCH];
    tile_run runs[SES_BATCH];
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

/* Likewise as integers. */
static char *codes_at(const attn_loop *l, int64_t h, int64_t i)
{
    int64_t row = kern_attn_query_bytes(l->p->m->config.head_dim);
    return l->p->query_codes + (h * l->n + i) * group_of(l->p) * row;
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
            if (p->query_codes)
                ops->attn->query(q, D, 1 / sqrtf((float)D),
                                 codes_at(l, h / group, i) + h % group * kern_attn_query_bytes(D));
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

/* What a worker needs of its own. */
typedef struct bench {
    void *block;   /* of keys and values as integers; NULL when attention runs in f32 */
    float *scores; /* of a tile's queries */
    float *own;    /* for a way's own use */
} bench;

static int64_t scores_floats(const model_config *c)
{
    return (int64_t)TILE_ROWS * (c->n_heads / c->n_kv_heads) * KERN_BLOCK;
}

static bench bench_of(const attn_loop *l, int worker)
{
    const pass *p = l->p;
    const model_config *c = &p->m->config;
    char *work = p->attn_work + worker * attn_work_bytes(p->m);
    int64_t block = p->query_codes ? kern_attn_block_bytes(c->head_dim) : 0;
    float *scores = (float *)(void *)(work + block);
    return (bench){block ? work : NULL, scores, scores + scores_floats(c)};
}

/* A block of head h as the first `n_rows` positions of the session have it. */
static kern_kv lay_block(const attn_loop *l, const ses *s, int64_t n_rows, int h, int64_t block,
                         bench w)
{
    const kern_ops *ops = l->p->m->ops;
    int64_t from = block * KERN_BLOCK, n_pages = kv_n_pages(n_rows), n = n_rows - from;
    kern_kv kv = {.is_f16 = s->codec == KV_F16,
                  .dim = l->p->m->config.head_dim,
                  .n = n < KERN_BLOCK ? n : KERN_BLOCK};
    for (int64_t i = 0, page = from / KERN_PAGE; i < KERN_BLOCK_PAGES && page < n_pages;
         i++, page++) {
        int64_t next = page + KERN_BLOCK_PAGES;
        kv.keys[i] = kv_head(s, l->slot, KV_KEY, page, h);
        kv.values[i] = kv_head(s, l->slot, KV_VALUE, page, h);
        int is_there = next < n_pages;
        kv.next_keys[i] = is_there ? kv_head(s, l->slot, KV_KEY, next, h) : kv.keys[i];
        kv.next_values[i] = is_there ? kv_head(s, l->slot, KV_VALUE, next, h) : kv.values[i];
    }
    if (w.block) ops->attn->prepare(&kv, w.block);
    return kv;
}

/* What rows [i, i + n) that read head h find in the first `sees` positions of a block. */
static void meet(const attn_loop *l, kern_kv kv, int64_t sees, int h, int64_t i, int64_t n, bench w,
                 const kern_found *to)
{
    const kern_ops *ops = l->p->m->ops;
    int64_t n_q = n * group_of(l->p);
    kv.n = sees < KERN_BLOCK ? sees : KERN_BLOCK;
    if (w.block)
        ops->attn->attend(&kv, w.block, codes_at(l, h, i), n_q, w.scores, to);
    else
        ops->attend(&kv, queries_at(l, h, i), n_q, 1 / sqrtf((float)kv.dim), w.scores, to);
}

/* What the queries of a tile that read head h find in a block. Rows that see a part of it take
 * their own call; rows before it are left out. */
static void find(const attn_loop *l, const tile *t, const kern_kv *kv, int h, int64_t block,
                 bench w, kern_found to)
{
    int64_t group = group_of(l->p), from = block * KERN_BLOCK;
    if (from + KERN_BLOCK <= t->pos + 1) {
        meet(l, *kv, KERN_BLOCK, h, t->first, t->n, w, &to);
        return;
    }
    for (int64_t i = 0; i < t->n; i++) {
        int64_t sees = t->pos + i + 1 - from, q = i * group;
        if (sees <= 0) continue;
        kern_found own = {to.top + q, to.sum + q, to.out + q * kv->dim};
        meet(l, *kv, sees, h, t->first + i, 1, w, &own);
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

/* ---- many rows: a worker takes a run of tiles through all blocks ---------------------------- */

int64_t attn_work_bytes(const model *m)
{
    const model_config *c = &m->config;
    int64_t group = c->n_heads / c->n_kv_heads, queries = TILE_ROWS * group;
    int64_t floats = scores_floats(c) + queries * (c->head_dim + 2) + 2 * RUN_ROWS * group;
    int64_t block = m->int8 ? kern_attn_block_bytes(c->head_dim) : 0;
    return (block + floats * (int64_t)sizeof(float) + 63) / 64 * 64;
}

/* Results of a run's queries so far. */
typedef struct so_far {
    float *top, *sum;
} so_far;

/* What a tile of the run that starts at row `first` finds in a block joins its results. */
static void join(const attn_loop *l, const tile *t, const kern_kv *kv, int h, int64_t block,
                 bench w, int64_t first, so_far r)
{
    const pass *p = l->p;
    int64_t group = group_of(p), D = kv->dim, queries = TILE_ROWS * group;
    int64_t unseen = block * KERN_BLOCK - t->pos; /* rows before the block */
    float *out = w.own;
    kern_found found = {out + queries * D, out + queries * (D + 1), out};
    find(l, t, kv, h, block, w, found);
    for (int64_t q = unseen > 0 ? unseen * group : 0; q < t->n * group; q++) {
        int64_t i = t->first + q / group, at = q + (t->first - first) * group;
        float *acc = p->heads + (i * p->m->config.n_heads + h * group + q % group) * D;
        merge(p->m->ops, D, found.top[q], found.sum[q], out + q * D, &r.top[at], &r.sum[at], acc);
    }
}

/* Items are (run, head of keys) pairs. */
static void attend_runs(void *ctx, int64_t begin, int64_t end, int worker)
{
    const attn_loop *l = ctx;
    const pass *p = l->p;
    const model_config *c = &p->m->config;
    int64_t group = group_of(p), queries = TILE_ROWS * group;
    bench w = bench_of(l, worker);
    float *top = w.own + queries * (c->head_dim + 2);
    so_far r = {top, top + RUN_ROWS * group};

    for (int64_t item = begin; item < end; item++) {
        const tile_run *run = &l->runs[item / c->n_kv_heads];
        const tile *last = run->last;
        int64_t h = item % c->n_kv_heads, first = run->first->first;
        int64_t n = (last->first + last->n - first) * group;
        for (int64_t q = 0; q < n; q++)
            start(p, first + q / group, h * group + q % group, &r.top[q], &r.sum[q]);
        for (int64_t b = 0; b < last->n_blocks; b++) {
            if (!pool_goes_on(p->m->pool)) return; /* a long text has thousands of blocks */
            kern_kv kv = lay_block(l, last->s, last->pos + last->n, (int)h, b, w);
            for (const tile *t = run->first; t <= last; t++)
                if (b < t->n_blocks) join(l, t, &kv, (int)h, b, w, first, r);
        }
        for (int64_t q = 0; q < n; q++)
            finish(p, first + q / group, h * group + q % group, r.sum[q]);
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
    bench w = bench_of(l, worker);
    for (int64_t item = begin; item < end; item++) {
        const tile *t = tile_of_item(l, item);
        int64_t h = (item - t->first_item) / t->n_blocks;
        int64_t block = (item - t->first_item) % t->n_blocks;
        kern_kv kv = lay_block(l, t->s, t->pos + t->n, (int)h, block, w);
        find(l, t, &kv, (int)h, block, w, found_at(l, t, h, block));
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

/* Runs of at most n_tiles tiles. */
static void cut_runs(attn_loop *l, int64_t n_tiles)
{
    l->n_runs = 0;
    for (const tile *t = l->tiles; t < l->tiles + l->n_tiles; t++) {
        tile_run *run = &l->runs[l->n_runs - 1];
        if (l->n_runs && t - run->first < n_tiles && t->s == run->last->s)
            run->last = t;
        else
            l->runs[l->n_runs++] = (tile_run){t, t};
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
        int64_t n_tiles = n_whole / wanted;
        cut_runs(l, n_tiles < 1 ? 1 : n_tiles < RUN_TILES ? n_tiles : RUN_TILES);
        pool_for(threads, l->n_runs * c->n_kv_heads, 1, attend_runs, l);
        return;
    }
    pool_for(threads, l->n_items, 1, find_blocks, l); /* a block takes some 20 us */
    pool_for(threads, l->n * c->n_heads, 4, merge_blocks, l);
}

void attn_mix(pass *p, const attn_weights *w, int slot, int64_t n)
{
    attn_loop l = {.p = p, .w = w, .slot = slot, .n = n};
    kern_job jobs[] = {
        pass_job(&w->q_proj, p->u, n, p->qg),
        pass_job(&w->k_proj, p->u, n, p->k),
        pass_job(&w->v_proj, p->u, n, p->v),
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
