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

/* 32 columns that lie at p: those in odd and in even places. */
V16_FN void bf16_apart(num_mode mode, const uint8_t *p, v16_group g, v16 *odd, v16 *even)
{
    if (mode == NUM_BF16) {
        v16i pairs = v16i_load(p);
        *odd = v16_odd_bf16(pairs);
        *even = v16_even_bf16(pairs);
        return;
    }
    __m256i pairs = _mm256_loadu_si256((const void *)p);
    if (mode == NUM_FP8) {
        *odd = v16_odd_e4m3(pairs);
        *even = v16_even_e4m3(pairs);
        return;
    }
    *odd = v16_scaled(v16_odd_e4m3(pairs), g);
    *even = v16_scaled(v16_even_e4m3(pairs), g);
}

/* Scales of fp8 as f32, [n_rows][groups]. */
static void bf16_scales_of(const num_matrix *w, int64_t row, int64_t n_rows, float *out)
{
    int64_t n_groups = count_groups(NUM_FP8, w);
    for (int64_t r = 0; r < n_rows; r++, out += n_groups) {
        row_source src = row_at(NUM_FP8, w, row + r);
        for (int64_t g = 0; g < n_groups; g += STRIP) {
            int64_t n = least(n_groups - g, STRIP);
            v16_store_upto(out + g, load_numbers(NUM_FP8, src.scales, w->scale_dtype, g, n, 1.0f),
                           n);
        }
    }
}

/* Scales of rows from column k on, where a strip of them begins there. */
V16_FN void bf16_scales(num_mode mode, const num_matrix *w, int64_t row, int n_rows, int64_t k,
                        strip *s)
{
    int64_t g = k / BF16_STEP, n = least(w->cols / BF16_STEP - g, STRIP);
    if (mode == NUM_MXFP8 && g % STRIP == 0)
        EACH_ROW load_strip(mode, w, row_at(mode, w, row + r), g, n, &s[r]);
}

V16_FN void bf16_lay_row(num_mode mode, const num_matrix *w, int64_t row, float *out)
{
    const uint8_t *codes = w->codes + row * w->row_bytes;
    strip s = {{0}, {0}};
    for (int64_t k = 0; k < w->cols; k += BF16_STEP) {
        v16 odd, even;
        bf16_scales(mode, w, row, 1, k, &s);
        v16_group g = make_group(mode, w->bits, &s, k / BF16_STEP % STRIP);
        bf16_apart(mode, codes + k * w->bits / 8, g, &odd, &even);
        v16_store(out + k, odd);
        v16_store(out + k + KERN_LANES, even);
    }
}

static __attribute__((noinline)) void bf16_lay(const num_matrix *w, int64_t row, int64_t n_rows,
                                               float *out)
{
    for (int64_t r = 0; r < n_rows; r++, out += w->cols)
        if (w->mode == NUM_BF16)
            bf16_lay_row(NUM_BF16, w, row + r, out);
        else if (w->mode == NUM_FP8)
            bf16_lay_row(NUM_FP8, w, row + r, out);
        else
            bf16_lay_row(NUM_MXFP8, w, row + r, out);
}

#define EACH_TOKEN _Pragma("GCC unroll 4") for (int t = 0; t < n_tokens; t++)

/* sum += what a group comes to, of n_rows rows from r on whose scales are [row][n_groups]. */
V16_FN void bf16_add_group(num_mode mode, int n_rows, int n_tokens, const float *scales,
                           int64_t n_groups, int64_t g, v16 part[V16_FUSED_ROWS][V16_DOT_TOKENS],
                           v16 sum[V16_FUSED_ROWS][V16_DOT_TOKENS])
{
    EACH_ROW EACH_TOKEN sum[r][t] =
        mode == NUM_FP8 ? v16_fma(v16_set1(scales[r * n_groups + g]), part[r][t], sum[r][t])
                        : part[r][t];
}

/* n_rows rows straight from the file times n_tokens, both constants. */
V16_FN void bf16_few_rows(num_mode mode, const num_matrix *w, int64_t row, int n_rows,
                          const float *scales, const float *x, int64_t ldx, int n_tokens, float *y,
                          int64_t ldy)
{
    const int bytes = mode == NUM_BF16 ? 2 : 1;
    const uint8_t *codes = w->codes + row * w->row_bytes;
    int64_t stride = w->row_bytes, k = 0;
    kern_ahead ahead = kern_look_ahead(w, row, n_rows);
    int64_t group = mode == NUM_FP8 ? w->group : w->cols, n_groups = (w->cols + group - 1) / group;
    v16 sum[V16_FUSED_ROWS][V16_DOT_TOKENS], part[V16_FUSED_ROWS][V16_DOT_TOKENS];
    strip s[V16_FUSED_ROWS];
    EACH_ROW EACH_TOKEN sum[r][t] = v16_zero();
    for (int64_t g = 0; g < n_groups; g++) {
        EACH_ROW EACH_TOKEN part[r][t] = v16_zero();
        for (int64_t end = least(k + group, w->cols); k < end; k += BF16_STEP) {
            bf16_scales(mode, w, row, n_rows, k, s);
            v16 odd[V16_DOT_TOKENS], even[V16_DOT_TOKENS];
            EACH_TOKEN
            {
                odd[t] = v16_load(x + t * ldx + k);
                even[t] = v16_load(x + t * ldx + k + KERN_LANES);
            }
            EACH_ROW
            {
                const uint8_t *p = codes + r * stride + bytes * k;
                if (bytes * k % 64 == 0) kern_ask(&ahead, KERN_ASKS, bytes * k * n_rows + 64 * r);
                v16_group values = v16_scale_group(1.0f);
                if (mode == NUM_MXFP8) values = make_group(mode, 8, &s[r], k / BF16_STEP % STRIP);
                v16 a, b;
                bf16_apart(mode, p, values, &a, &b);
                EACH_TOKEN part[r][t] = v16_fma(b, even[t], v16_fma(a, odd[t], part[r][t]));
            }
        }
        bf16_add_group(mode, n_rows, n_tokens, scales, n_groups, g, part, sum);
    }
    EACH_TOKEN EACH_ROW y[t * ldy + r] = v16_sum(sum[r][t]);
}

V16_FN void bf16_few_tokens(num_mode mode, const num_matrix *w, int64_t row, int64_t n_rows,
                            const float *scales, const float *x, int64_t ldx, int n_tokens,
                            float *y, int64_t ldy)
{
    int64_t r = 0, n_groups = count_groups(mode, w);
    for (; r + V16_FUSED_ROWS <= n_rows; r += V16_FUSED_ROWS)
        bf16_few_rows(mode, w, row + r, V16_FUSED_ROWS, scales + r * n_groups, x, ldx, n_tokens,
                      y + r, ldy);
    for (; r < n_rows; r++)
        bf16_few_rows(mode, w, row + r, 1, scales + r * n_groups, x, ldx, n_tokens, y + r, ldy);
}

typedef void bf16_few_fn(const num_matrix *w, int64_t row, int64_t n_rows, const float *scales,
                         const float *x, int64_t ldx, int64_t n_x, float *y, int64_t ldy);

#define BF16_FEW(name, mode)                                                                       \
    static __attribute__((noinline)) void bf16_few_##name(                                         \
        const num_matrix *w, int64_t row, int64_t n_rows, const float *scales, const float *x,     \
        int64_t ldx, int64_t n_x, float *y, int64_t ldy)                                           \
    {                                                                                              \
        switch (n_x) {                                                                             \
        case 1: bf16_few_tokens(mode, w, row, n_rows, scales, x, ldx, 1, y, ldy); break;           \
        case 2: bf16_few_tokens(mode, w, row, n_rows, scales, x, ldx, 2, y, ldy); break;           \
        case 3: bf16_few_tokens(mode, w, row, n_rows, scales, x, ldx, 3, y, ldy); break;           \
        case 4:                                                                                    \
            bf16_few_tokens(mode, w, row, n_rows, scales, x, ldx, V16_DOT_TOKENS, y, ldy);         \
            break;                                                                                 \
        }                                                                                          \
    }

BF16_FEW(dense, NUM_BF16)
BF16_FEW(mxfp8, NUM_MXFP8)
BF16_FEW(fp8, NUM_FP8)

static __attribute__((noinline)) void bf16_dots(const float *w, int64_t n_rows, const float *x,
                                                int64_t ldx, int64_t n_x, int64_t cols, float *y,
                                                int64_t ldy)
{
    for (int64_t t = 0; t < n_x; t += KERN_TOKENS)
        for (int64_t r = 0; r < n_rows; r += KERN_ROWS)
            dots(w + r * cols, cols, (int)least(n_rows - r, KERN_ROWS), x + t * ldx, ldx,
                 least(n_x - t, KERN_TOKENS), cols, y + t * ldy + r, ldy);
}

/* V16_DOT_ROWS x n_tokens of decoded rows of fp8, or one row. */
V16_FN void bf16_group_block(const num_matrix *w, const float *rows, int n_rows,
                             const float *scales, const float *x, int64_t ldx, int n_tokens,
                             float *y, int64_t ldy)
{
    int64_t cols = w->cols, n_groups = count_groups(NUM_FP8, w), k = 0;
    v16 sum[V16_FUSED_ROWS][V16_DOT_TOKENS], part[V16_FUSED_ROWS][V16_DOT_TOKENS];
    v16 b[V16_DOT_TOKENS];
    EACH_ROW EACH_TOKEN sum[r][t] = v16_zero();
    for (int64_t g = 0; g < n_groups; g++) {
        EACH_ROW EACH_TOKEN part[r][t] = v16_zero();
        for (int64_t end = least(k + w->group, cols); k < end; k += KERN_LANES) {
            EACH_TOKEN b[t] = v16_load(x + t * ldx + k);
            EACH_ROW
            {
                v16 a = v16_load(rows + r * cols + k);
                EACH_TOKEN part[r][t] = v16_fma(a, b[t], part[r][t]);
            }
        }
        bf16_add_group(NUM_FP8, n_rows, n_tokens, scales, n_groups, g, part, sum);
    }
    EACH_TOKEN EACH_ROW y[t * ldy + r] = v16_sum(sum[r][t]);
}

V16_FN void bf16_group_rows(const num_matrix *w, const float *rows, int n_rows, const float *scales,
                            const float *x, int64_t ldx, int64_t n_x, float *y, int64_t ldy)
{
    int64_t t = 0;
    for (; t + V16_DOT_TOKENS <= n_x; t += V16_DOT_TOKENS)
        bf16_group_block(w, rows, n_rows, scales, x + t * ldx, ldx, V16_DOT_TOKENS, y + t * ldy,
                         ldy);
    for (; t < n_x; t++)
        bf16_group_block(w, rows, n_rows, scales, x + t * ldx, ldx, 1, y + t * ldy, ldy);
}

static __attribute__((noinline)) void bf16_group_dots(const num_matrix *w, const float *rows,
                                                      int64_t n_rows, const float *scales,
                                                      const float *x, int64_t ldx, int64_t n_x,
                                                      float *y, int64_t ldy)
{
    int64_t cols = w->cols, n_groups = count_groups(NUM_FP8, w);
    for (int64_t t = 0; t < n_x; t += KERN_TOKENS) {
        int64_t r = 0, n = least(n_x - t, KERN_TOKENS);
        for (; r + V16_DOT_ROWS <= n_rows; r += V16_DOT_ROWS)
            bf16_group_rows(w, rows + r * cols, V16_DOT_ROWS, scales + r * n_groups, x + t * ldx,
                            ldx, n, y + t * ldy + r, ldy);
        for (; r < n_rows; r++)
            bf16_group_rows(w, rows + r * cols, 1, scales + r * n_groups, x + t * ldx, ldx, n,
                            y + t * ldy + r, ldy);
    }
}

static void bf16_product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x,
                         int64_t n_x, float *y, int64_t ldy, void *scratch)
{
    int64_t cols = w->cols, ldx = cols + 64 / (int64_t)sizeof(float);
    float *rows = scratch, *scales = rows + n_rows * cols;
    if (w->mode == NUM_FP8) bf16_scales_of(w, row, n_rows, scales);
    if (n_x <= V16_DOT_TOKENS) {
        bf16_few_fn *few = w->mode == NUM_BF16    ? bf16_few_dense
                           : w->mode == NUM_MXFP8 ? bf16_few_mxfp8
                                                  : bf16_few_fp8;
        BF16_FLUSHED(few(w, row, n_rows, scales, x, ldx, n_x, y, ldy));
        return;
    }
    BF16_FLUSHED(bf16_lay(w, row, n_rows, rows));
    if (w->mode == NUM_FP8)
        BF16_FLUSHED(bf16_group_dots(w, rows, n_rows, scales, x, ldx, n_x, y, ldy));
    else
        BF16_FLUSHED(bf16_dots(rows, n_rows, x, ldx, n_x, cols, y, ldy));
}

static const kern_bf16_ops bf16_ops __attribute__((unused)) = {
    .element = sizeof(float), .round = bf16_round, .product = bf16_product};

#endif
