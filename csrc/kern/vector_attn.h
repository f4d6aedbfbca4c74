/* Attention over v16. Included once by avx2.c and avx512.c; scalar.c says what it computes.
 *
 * Scores and weighted values are the same sum: out[m] = sum_k a[m][k] b[k], where b[k] is a row of
 * one dimension of many keys, or of one position's value. A register block of V16_MIX_ROWS queries
 * reads and widens each row of b once. */
#ifndef KERN_VECTOR_ATTN_H
#define KERN_VECTOR_ATTN_H

#include <string.h>

#include "kern/kern_const.h"
#include "kern/vector_math.h"

/* Columns [at, at + 16) of a stored row, of which n >= 1 are there. */
V16_FN v16 load_stored(const void *row, int is_f16, int64_t at, int64_t n)
{
    if (!is_f16) return v16_load_upto((const float *)row + at, n);
    const uint16_t *p = (const uint16_t *)row + at;
    if (n >= KERN_LANES) return v16_from_f16(_mm256_loadu_si256((const void *)p));
    uint16_t copy[KERN_LANES] = {0};
    memcpy(copy, p, (size_t)n * sizeof *p);
    return v16_from_f16(_mm256_loadu_si256((const void *)copy));
}

/* Rows of b: page after page, page_rows in each, ld apart. */
typedef struct mix_rows {
    const void *const *pages;
    int64_t page_rows, ld, n;
    const void *const *soon; /* what is read after them, for each page */
    int64_t soon_at;         /* in bytes */
} mix_rows;

#define EACH_QUERY  _Pragma("GCC unroll 8") for (int m = 0; m < n_q; m++)
#define EACH_COLUMN _Pragma("GCC unroll 2") for (int c = 0; c < n_cols; c++)

/* n_q queries x n_cols registers from column `at` on, of which `width` columns are there; is_f16,
 * n_q, n_cols and look_ahead, the bytes that are fetched for each row, are constants. */
V16_FN void mix_block(int is_f16, int n_q, int n_cols, int look_ahead, const float *a, int64_t lda,
                      const mix_rows *b, int64_t at, int64_t width, float *out, int64_t ldo)
{
    v16 sum[V16_MIX_ROWS][V16_MIX_COLS], x[V16_MIX_COLS];
    EACH_QUERY EACH_COLUMN sum[m][c] = v16_zero();
    for (int64_t first = 0, page = 0; first < b->n; first += b->page_rows, page++) {
        int64_t n = b->n - first < b->page_rows ? b->n - first : b->page_rows;
        const char *row = b->pages[page], *soon = NULL;
        if (look_ahead) soon = (const char *)b->soon[page] + b->soon_at;
        for (int64_t k = 0; k < n; k++, row += b->ld * (is_f16 ? 2 : 4)) {
            EACH_COLUMN x[c] = load_stored(row, is_f16, at + c * KERN_LANES, width);
            if (look_ahead) _mm_prefetch(soon + k * look_ahead, _MM_HINT_T1);
            EACH_QUERY
            {
                v16 w = v16_set1(a[m * lda + first + k]);
                EACH_COLUMN sum[m][c] = v16_fma(w, x[c], sum[m][c]);
            }
        }
    }
    EACH_QUERY EACH_COLUMN v16_store_upto(out + m * ldo + at + c * KERN_LANES, sum[m][c], width);
}

V16_FN void mix_queries(int is_f16, int n_cols, int look_ahead, const float *a, int64_t lda,
                        int64_t n_q, const mix_rows *b, int64_t at, int64_t width, float *out,
                        int64_t ldo)
{
    int64_t m = 0;
#define BLOCKS_OF(rows)                                                                            \
    for (; m + rows <= n_q; m += rows)                                                             \
        if (look_ahead && m == 0)                                                                  \
            mix_block(is_f16, rows, n_cols, look_ahead, a, lda, b, at, width, out, ldo);           \
        else                                                                                       \
            mix_block(is_f16, rows, n_cols, 0, a + m * lda, lda, b, at, width, out + m * ldo, ldo)
    BLOCKS_OF(V16_MIX_ROWS);
    BLOCKS_OF(4);
    BLOCKS_OF(2);
    BLOCKS_OF(1);
#undef BLOCKS_OF
}

/* While the queries meet a page of keys, that page's values are fetched. */
V16_FN void score_pages(int is_f16, int64_t dim, const kern_kv *kv, const float *q, int64_t n_q,
                        float *scores)
{
    int64_t n_pages = (kv->n + KERN_PAGE - 1) / KERN_PAGE, wide = V16_MIX_COLS * KERN_LANES;
    for (int64_t p = 0; p < n_pages; p++) {
        mix_rows b = {&kv->keys[p], dim, KERN_PAGE, dim, &kv->values[p], 0};
        for (int64_t at = 0; at < KERN_PAGE; at += wide)
            mix_queries(is_f16, V16_MIX_COLS, KERN_PAGE * 2, q, dim, n_q, &b, at, wide,
                        scores + p * KERN_PAGE, KERN_BLOCK);
    }
}

/* While they meet the values, the next block's keys are fetched. */
V16_FN void add_values(int is_f16, int64_t dim, const kern_kv *kv, const float *e, int64_t n_q,
                       float *out)
{
    mix_rows b = {kv->values, KERN_PAGE, dim, kv->n, kv->next_keys, 0};
    enum { WIDE = V16_MIX_COLS * KERN_LANES };
    int64_t at = 0;
    for (; at + WIDE <= dim; at += WIDE, b.soon_at += KERN_PAGE * WIDE * 2)
        mix_queries(is_f16, V16_MIX_COLS, WIDE * 2, e, KERN_BLOCK, n_q, &b, at, WIDE, out, dim);
    for (; at < dim; at += KERN_LANES)
        mix_queries(is_f16, 1, 0, e, KERN_BLOCK, n_q, &b, at, dim - at, out, dim);
}

V16_FN void attend_pages(int is_f16, int64_t dim, const kern_kv *kv, const float *q, int64_t n_q,
                         float scale, float *scores, const kern_found *found)
{
    score_pages(is_f16, dim, kv, q, n_q, scores);
    for (int64_t t = 0; t < n_q; t++) {
        float *s = scores + t * KERN_BLOCK;
        scale_by(s, scale, kv->n);
        found->sum[t] = exps(s, kv->n, &found->top[t]);
    }
    add_values(is_f16, dim, kv, scores, n_q, found->out);
}

static void attend(const kern_kv *kv, const float *q, int64_t n_q, float scale, float *scores,
                   const kern_found *found)
{
    if (!kv->is_f16)
        attend_pages(0, kv->dim, kv, q, n_q, scale, scores, found);
    else if (kv->dim == 256) /* Qwen's */
        attend_pages(1, 256, kv, q, n_q, scale, scores, found);
    else
        attend_pages(1, kv->dim, kv, q, n_q, scale, scores, found);
}

static void axpby(float b, const float *x, float a, float *acc, int64_t n)
{
    v16 va = v16_set1(a), vb = v16_set1(b);
    for (int64_t k = 0; k < n; k += KERN_LANES) {
        v16 old = v16_mul(va, v16_load_upto(acc + k, n - k));
        v16_store_upto(acc + k, v16_fma(vb, v16_load_upto(x + k, n - k), old), n - k);
    }
}

#endif
