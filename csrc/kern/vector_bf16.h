/* The products of bf16.h by f32 arithmetic over v16. Included once by avx2.c and avx512*.c.
 *
 * Rows of x and decoded rows of w hold the odd ones of 32 columns, then the even ones: a dot
 * product of kern.h over those is one of bf16.h. */
#ifndef KERN_VECTOR_BF16_H
#define KERN_VECTOR_BF16_H

#include "kern/bf16.h"
#include "kern/vector_matrix.h"

static void bf16_round(const float *x, int64_t cols, void *row)
{
    float *out = row;
    for (int64_t k = 0; k < cols; k += BF16_STEP) {
        v16 a = v16_round_bf16(v16_load(x + k)), b = v16_round_bf16(v16_load(x + k + KERN_LANES));
        v16_store(out + k, v16_odd(a, b));
        v16_store(out + k + KERN_LANES, v16_even(a, b));
    }
}

static void bf16_lay_row(const num_matrix *w, int64_t row, float *out)
{
    const uint8_t *codes = w->codes + row * w->row_bytes;
    for (int64_t k = 0; k < w->cols; k += BF16_STEP) {
        v16i pairs = v16i_load(codes + 2 * k);
        v16_store(out + k, v16_odd_bf16(pairs));
        v16_store(out + k + KERN_LANES, v16_even_bf16(pairs));
    }
}

#define EACH_TOKEN _Pragma("GCC unroll 4") for (int t = 0; t < n_tokens; t++)

/* n_rows rows straight from the file times n_tokens, both constants. */
V16_FN void bf16_few_rows(const num_matrix *w, int64_t row, int n_rows, const float *x, int64_t ldx,
                          int n_tokens, float *y, int64_t ldy)
{
    const uint8_t *codes = w->codes + row * w->row_bytes;
    int64_t ahead = kern_ahead(w, row, n_rows), stride = w->row_bytes;
    v16 sum[V16_FUSED_ROWS][V16_DOT_TOKENS];
    EACH_ROW EACH_TOKEN sum[r][t] = v16_zero();
    for (int64_t k = 0; k < w->cols; k += BF16_STEP) {
        v16 odd[V16_DOT_TOKENS], even[V16_DOT_TOKENS];
        EACH_TOKEN
        {
            odd[t] = v16_load(x + t * ldx + k);
            even[t] = v16_load(x + t * ldx + k + KERN_LANES);
        }
        EACH_ROW
        {
            const uint8_t *p = codes + r * stride + 2 * k;
            kern_prefetch(p + ahead);
            v16i pairs = v16i_load(p);
            v16 a = v16_odd_bf16(pairs), b = v16_even_bf16(pairs);
            EACH_TOKEN sum[r][t] = v16_fma(b, even[t], v16_fma(a, odd[t], sum[r][t]));
        }
    }
    EACH_TOKEN EACH_ROW y[t * ldy + r] = v16_sum(sum[r][t]);
}

V16_FN void bf16_few_tokens(const num_matrix *w, int64_t row, int64_t n_rows, const float *x,
                            int64_t ldx, int n_tokens, float *y, int64_t ldy)
{
    int64_t r = 0;
    for (; r + V16_FUSED_ROWS <= n_rows; r += V16_FUSED_ROWS)
        bf16_few_rows(w, row + r, V16_FUSED_ROWS, x, ldx, n_tokens, y + r, ldy);
    for (; r < n_rows; r++) bf16_few_rows(w, row + r, 1, x, ldx, n_tokens, y + r, ldy);
}

static __attribute__((noinline)) void bf16_few(const num_matrix *w, int64_t row, int64_t n_rows,
                                               const float *x, int64_t ldx, int64_t n_x, float *y,
                                               int64_t ldy)
{
    switch (n_x) {
    case 1: bf16_few_tokens(w, row, n_rows, x, ldx, 1, y, ldy); break;
    case 2: bf16_few_tokens(w, row, n_rows, x, ldx, 2, y, ldy); break;
    case 3: bf16_few_tokens(w, row, n_rows, x, ldx, 3, y, ldy); break;
    case 4: bf16_few_tokens(w, row, n_rows, x, ldx, V16_DOT_TOKENS, y, ldy); break;
    }
}

static __attribute__((noinline)) void bf16_dots(const float *w, int64_t n_rows, const float *x,
                                                int64_t ldx, int64_t n_x, int64_t cols, float *y,
                                                int64_t ldy)
{
    for (int64_t t = 0; t < n_x; t += KERN_TOKENS)
        for (int64_t r = 0; r < n_rows; r += KERN_ROWS)
            dots(w + r * cols, cols, (int)least(n_rows - r, KERN_ROWS), x + t * ldx, ldx,
                 least(n_x - t, KERN_TOKENS), cols, y + t * ldy + r, ldy);
}

static void bf16_product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x,
                         int64_t n_x, float *y, int64_t ldy, void *scratch)
{
    int64_t cols = w->cols, ldx = cols + 64 / (int64_t)sizeof(float);
    if (n_x <= V16_DOT_TOKENS) {
        BF16_FLUSHED(bf16_few(w, row, n_rows, x, ldx, n_x, y, ldy));
        return;
    }
    float *rows = scratch;
    for (int64_t r = 0; r < n_rows; r++) bf16_lay_row(w, row + r, rows + r * cols);
    BF16_FLUSHED(bf16_dots(rows, n_rows, x, ldx, n_x, cols, y, ldy));
}

static const kern_bf16_ops bf16_ops __attribute__((unused)) = {
    .element = sizeof(float), .round = bf16_round, .product = bf16_product};

#endif
