/* Attention in integers over v16; int_attn.h says what it computes. Included once by avx2.c and
 * avx512.c, after vector_attn.h.
 *
 * Scores and weighted values are the same sum, as in vector_attn.h: out[m] = sum_k a[m][k] b[k],
 * where a step k takes V16_KEY_DIMS dimensions of 16 keys to a register, or two positions of 16
 * dimensions of a value. What V16_MIX_COLS registers need lies together, step after step:
 *   keys    [KERN_BLOCK / COLUMNS][width / V16_KEY_DIMS][COLUMNS][V16_KEY_DIMS]
 *   values  [width / COLUMNS][KERN_BLOCK / 2][COLUMNS][2] */
#ifndef KERN_VECTOR_INT_ATTN_H
#define KERN_VECTOR_INT_ATTN_H

#include <float.h>
#include <string.h>

#include "kern/int_attn.h"
#include "kern/vector_attn.h"

enum {
    INT_COLUMNS = V16_MIX_COLS * KERN_LANES,
    INT_STEP = V16_MIX_COLS * 64,
    INT_PART_STEPS = INT_ATTN_PART / V16_KEY_DIMS
};

/* ---- a block's codes ------------------------------------------------------------------------ */

/* int_attn_scale in every lane. */
V16_FN v16 int_scales(v16 largest, int steps, v16 *inverse)
{
    v16 n = v16_set1((float)steps), least = v16_set1(INT_ATTN_LEAST);
    *inverse = v16_if_gt(least, largest, v16_zero(), v16_div(n, largest));
    v16 scale = v16_if_gt(least, largest, v16_zero(), v16_div(largest, n));
    return v16_if_gt(largest, v16_set1(FLT_MAX), v16_set1(NAN), scale);
}

/* The largest magnitudes of 16 positions from `at` on, which lie behind a page, `row` the first. */
V16_FN v16 page_sizes(int is_f16, int64_t dim, const void *page, int64_t row, int64_t at)
{
    return load_stored(page, is_f16, (dim + row) * KERN_PAGE + at, KERN_LANES);
}

/* What is read next is fetched while a block computes, half of a block's keys or values in each of
 * four passes and one and a half to three and a half passes before its use: the second half of the
 * block's values while its keys are made integers, the first half of the next block's keys with the
 * scores, the second with the block's values, the first half of the next block's values with the
 * weighted sums. More at once than memory can bring is forgotten. This is for the heads that Qwen
 * has, 256 wide and in f16: `at` of KERN_BLOCK columns along, dim bytes for each, in one half of
 * the pages; NULL for other heads and where no page is. */
V16_FN const char *int_soon(int is_f16, int64_t dim, const void *const *pages, int half, int64_t at)
{
    const char *page = pages[(half * KERN_BLOCK + at) / (2 * KERN_PAGE)];
    return is_f16 && dim == KERN_BLOCK && page ? page + at % (2 * KERN_PAGE) * dim : NULL;
}

/* Sizes of a page's values, and of the keys of the page that has its place in the next block. */
V16_FN void ask_sizes(int64_t dim, const kern_kv *kv, int64_t page)
{
    int64_t behind = dim * KERN_PAGE * 2;
    const char *next = (const char *)kv->next_keys[page] + behind;
    _mm_prefetch((const char *)kv->values[page] + behind, _MM_HINT_T1);
    for (int64_t i = 0; i < dim / INT_ATTN_PART * 64; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
}

/* Part g of 16 keys of a page, from column `at` on. For each step some bytes at `soon` are fetched.
 */
V16_FN void prepare_part(int is_f16, int64_t dim, const void *page, int64_t at, int64_t g,
                         float *scale, char *codes, const char *soon)
{
    int64_t first = g * INT_ATTN_PART,
            n = dim - first < INT_ATTN_PART ? dim - first : INT_ATTN_PART;
    const char *rows = (const char *)page + first * KERN_PAGE * (is_f16 ? 2 : 4);
    v16 round = v16_set1(INT_ATTN_ROUND + V16_KEY_OFFSET), inverse;
    v16_store(scale, int_scales(page_sizes(is_f16, dim, page, g, at), INT_KEY_STEPS, &inverse));
    for (int64_t i = 0; i < INT_ATTN_PART; i += V16_KEY_DIMS, codes += INT_STEP) {
        v16 t[V16_KEY_DIMS];
        for (int d = 0; d < V16_KEY_DIMS; d++) {
            v16 x = i + d < n ? load_stored(rows, is_f16, (i + d) * KERN_PAGE + at, KERN_LANES)
                              : v16_zero();
            t[d] = v16_fma(x, inverse, round);
            if (soon && d % 4 == 0) _mm_prefetch(soon + (i + d) * 16, _MM_HINT_T1);
        }
        v16i_store(codes, v16_join_keys(t));
    }
}

V16_FN void prepare_keys(int is_f16, int64_t dim, const kern_kv *kv, int_block to)
{
    int64_t n_parts = int_attn_width(dim) / INT_ATTN_PART;
    for (int64_t j = 0; j < kv->n; j += KERN_LANES) {
        const void *page = kv->keys[j / KERN_PAGE];
        const char *soon = int_soon(is_f16, dim, kv->values, 1, j);
        if (is_f16 && dim == KERN_BLOCK && j % KERN_PAGE == 0) ask_sizes(dim, kv, j / KERN_PAGE);
        char *codes = (char *)to.keys + j / INT_COLUMNS * n_parts * INT_PART_STEPS * INT_STEP +
                      j % INT_COLUMNS / KERN_LANES * 64;
        for (int64_t g = 0; g < n_parts; g++, codes += INT_PART_STEPS * INT_STEP)
            prepare_part(is_f16, dim, page, j % KERN_PAGE, g, to.key_scale + g * KERN_BLOCK + j,
                         codes, soon ? soon + g * INT_ATTN_PART * 16 : NULL);
    }
}

/* Two positions at a time; what is behind the last one counts as zeros. */
V16_FN void prepare_values(int is_f16, int64_t dim, const kern_kv *kv, int_block to)
{
    int64_t row_bytes = dim * (is_f16 ? 2 : 4);
    v16 round = v16_set1(INT_ATTN_ROUND), by;
    float inverse[KERN_LANES];
    for (int64_t j = 0; j < kv->n; j += 2) {
        const void *page = kv->values[j / KERN_PAGE];
        if (j % KERN_LANES == 0) {
            v16 sizes = page_sizes(is_f16, dim, page, 0, j % KERN_PAGE);
            v16_store(to.value_scale + j, int_scales(sizes, INT_VALUE_STEPS, &by));
            v16_store(inverse, by);
        }
        const char *even = (const char *)page + j % KERN_PAGE * row_bytes;
        const char *odd = j + 1 < kv->n ? even + row_bytes : even;
        const char *soon = int_soon(is_f16, dim, kv->next_keys, 1, j);
        char *codes = (char *)to.values + j / 2 * INT_STEP;
        v16 even_by = v16_set1(inverse[j % KERN_LANES]);
        v16 odd_by = odd > even ? v16_set1(inverse[j % KERN_LANES + 1]) : v16_zero();
        for (int64_t i = 0; i < dim; i += KERN_LANES) {
            v16 a = v16_fma(load_stored(even, is_f16, i, dim - i), even_by, round);
            v16 b = v16_fma(load_stored(odd, is_f16, i, dim - i), odd_by, round);
            char *at = codes + i / INT_COLUMNS * (KERN_BLOCK / 2) * INT_STEP +
                       i % INT_COLUMNS / KERN_LANES * 64;
            if (soon && i % 32 == 0) _mm_prefetch(soon + i * 2, _MM_HINT_T1);
            v16i_store(at, v16_join_pair(a, b));
        }
    }
}

V16_FN void prepare_pages(int is_f16, int64_t dim, const kern_kv *kv, int_block to)
{
    prepare_keys(is_f16, dim, kv, to);
    prepare_values(is_f16, dim, kv, to);
}

static void int_prepare(const kern_kv *kv, void *block)
{
    int_block to = int_block_at(block, kv->dim);
    if (!kv->is_f16)
        prepare_pages(0, kv->dim, kv, to);
    else if (kv->dim == 256) /* Qwen's */
        prepare_pages(1, 256, kv, to);
    else
        prepare_pages(1, kv->dim, kv, to);
}

/* ---- sums ----------------------------------------------------------------------------------- */

V16_FN v16i int_pair(const char *p)
{
    int32_t i;
    memcpy(&i, p, sizeof i);
    return v16i_set1(i);
}

/* sum += a b for n_q rows of a, lda bytes apart; is_keys and n_q are constants. The steps fetch
 * INT_COLUMNS * KERN_BLOCK bytes from `soon` on. */
V16_FN void int_mix(int is_keys, int n_q, const char *a, int64_t lda, const char *b,
                    int64_t n_steps, const char *soon, v16i sum[V16_MIX_ROWS][V16_MIX_COLS])
{
    enum { n_cols = V16_MIX_COLS };
    const int64_t n_fetched = INT_COLUMNS * (is_keys ? V16_KEY_DIMS : 2);
    for (int64_t k = 0; k < n_steps; k++, a += 4, b += INT_STEP) {
        v16i x[V16_MIX_COLS];
        EACH_COLUMN x[c] = v16i_load(b + c * 64);
        for (int64_t i = 0; soon && i < n_fetched; i += 64)
            _mm_prefetch(soon + k * n_fetched + i, _MM_HINT_T1);
        EACH_QUERY
        {
            v16i w = int_pair(a + m * lda);
            EACH_COLUMN sum[m][c] =
                is_keys ? v16i_add_keys(sum[m][c], x[c], w) : v16i_add_values(sum[m][c], x[c], w);
        }
    }
}

/* Scores of n_q queries, ldq bytes apart, for the INT_COLUMNS keys from column `at` on. */
V16_FN void int_scores(int n_q, int64_t dim, const int_block *b, int64_t at, const char *queries,
                       int64_t ldq, const char *soon, float *scores)
{
    enum { n_cols = V16_MIX_COLS };
    int64_t n_parts = int_attn_width(dim) / INT_ATTN_PART;
    int_query q = int_query_at(queries, dim);
    const char *a = V16_KEY_DIMS == 4 ? (const char *)q.codes : (const char *)q.wide;
    const char *keys =
        (const char *)b->keys + at / INT_COLUMNS * n_parts * INT_PART_STEPS * INT_STEP;
    for (int64_t g = 0; g < n_parts; g++) {
        v16i sum[V16_MIX_ROWS][V16_MIX_COLS];
        v16 k_scale[V16_MIX_COLS];
        EACH_QUERY EACH_COLUMN sum[m][c] =
            V16_KEY_OFFSET ? int_pair((const char *)(q.offset + g) + m * ldq) : v16i_set1(0);
        int_mix(1, n_q, a + g * INT_PART_STEPS * 4, ldq, keys + g * INT_PART_STEPS * INT_STEP,
                INT_PART_STEPS, soon ? soon + g * INT_ATTN_PART * INT_COLUMNS : NULL, sum);
        EACH_COLUMN k_scale[c] = v16_load(b->key_scale + g * KERN_BLOCK + at + c * KERN_LANES);
        EACH_QUERY
        {
            float q_scale;
            memcpy(&q_scale, (const char *)(q.scale + g) + m * ldq, sizeof q_scale);
            EACH_COLUMN
            {
                float *s = scores + m * KERN_BLOCK + at + c * KERN_LANES;
                v16 factor = v16_mul(k_scale[c], v16_set1(q_scale));
                v16_store(s,
                          v16_fma(v16_from_i32(sum[m][c]), factor, g ? v16_load(s) : v16_zero()));
            }
        }
    }
}

/* A row of scores once it holds the codes of weights: their scale lies behind them. */
enum { INT_WEIGHT_SCALE = KERN_BLOCK / 2 };

/* Exponentials to codes of weights, in their place. */
V16_FN void int_weigh(float *e, const float *value_scales, int64_t n)
{
    v16 largest = v16_zero(), round = v16_set1(INT_ATTN_ROUND);
    float inverse;
    for (int64_t j = 0; j < n; j += KERN_LANES) {
        v16 w = v16_mul(v16_load_upto(e + j, n - j), v16_load_upto(value_scales + j, n - j));
        largest = v16_max_size(largest, w);
        v16_store(e + j, w);
    }
    float scale = int_attn_scale(v16_top_bits(largest), INT_WEIGHT_STEPS, &inverse);
    v16 factor = v16_set1(inverse);
    for (int64_t j = 0; j < n; j += KERN_LANES)
        v16_store_low((char *)e + 2 * j, v16_fma(v16_load(e + j), factor, round));
    e[INT_WEIGHT_SCALE] = scale;
}

/* Weighted values of n_q queries: the INT_COLUMNS dimensions from `at` on. */
V16_FN void int_values(int n_q, int64_t dim, const int_block *b, int64_t n, int64_t at,
                       const float *weights, const char *soon, float *out)
{
    enum { n_cols = V16_MIX_COLS };
    const char *values = (const char *)b->values + at / INT_COLUMNS * (KERN_BLOCK / 2) * INT_STEP;
    v16i sum[V16_MIX_ROWS][V16_MIX_COLS];
    EACH_QUERY EACH_COLUMN sum[m][c] = v16i_set1(0);
    int_mix(0, n_q, (const char *)weights, KERN_BLOCK * 4, values, (n + 1) / 2, soon, sum);
    EACH_QUERY
    {
        v16 scale = v16_set1(weights[m * KERN_BLOCK + INT_WEIGHT_SCALE]);
        EACH_COLUMN
        {
            int64_t i = at + c * KERN_LANES;
            if (i >= dim) continue;
            v16_store_upto(out + m * dim + i, v16_mul(v16_from_i32(sum[m][c]), scale), dim - i);
        }
    }
}

#define BLOCKS_OF(rows, run)                                                                       \
    for (; m + rows <= n_q; m += rows) {                                                           \
        run(rows);                                                                                 \
    }
#define ALL_BLOCKS(run)                                                                            \
    for (int64_t m = 0, once = 1; once; once = 0) {                                                \
        BLOCKS_OF(V16_MIX_ROWS, run)                                                               \
        BLOCKS_OF(4, run)                                                                          \
        BLOCKS_OF(2, run)                                                                          \
        BLOCKS_OF(1, run)                                                                          \
    }

V16_FN void int_attend_pages(int64_t dim, const kern_kv *kv, int_block b, const char *queries,
                             int64_t n_q, float *scores, const kern_found *found)
{
    int64_t n = kv->n, ldq = kern_attn_query_bytes(dim);
    for (int64_t at = 0; at < n; at += INT_COLUMNS) {
        const char *soon = int_soon(kv->is_f16, dim, kv->next_keys, 0, at);
#define SCORES(rows)                                                                               \
    int_scores(rows, dim, &b, at, queries + m * ldq, ldq, m == 0 ? soon : NULL,                    \
               scores + m * KERN_BLOCK)
        ALL_BLOCKS(SCORES)
#undef SCORES
    }
    for (int64_t t = 0; t < n_q; t++) {
        float *s = scores + t * KERN_BLOCK;
        found->sum[t] = exps(s, n, &found->top[t]);
        int_weigh(s, b.value_scale, n);
    }
    for (int64_t at = 0; at < dim; at += INT_COLUMNS) {
        const char *soon = int_soon(kv->is_f16, dim, kv->next_values, 0, at);
#define VALUES(rows)                                                                               \
    int_values(rows, dim, &b, n, at, scores + m * KERN_BLOCK, m == 0 ? soon : NULL,                \
               found->out + m * dim)
        ALL_BLOCKS(VALUES)
#undef VALUES
    }
}

#undef BLOCKS_OF
#undef ALL_BLOCKS

static void int_attend(const kern_kv *kv, const void *block, const void *queries, int64_t n_q,
                       float *scores, const kern_found *found)
{
    int_block b = int_block_at(block, kv->dim);
    if (kv->dim == 256)
        int_attend_pages(256, kv, b, queries, n_q, scores, found);
    else
        int_attend_pages(kv->dim, kv, b, queries, n_q, scores, found);
}

static void int_query_row(const float *q, int64_t dim, float factor, void *row)
{
    int_attn_query(q, dim, factor, row);
}

static const kern_attn_ops int_attn_ops = {
    .query = int_query_row, .prepare = int_prepare, .attend = int_attend};

#endif
