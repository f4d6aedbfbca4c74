/* Decoding and products over v16. Included once by avx2.c and avx512.c.
 *
 * Everything is written for a mode and a width of code that are constants after inlining. 16
 * columns are decoded at a time from exactly their 2 * bits bytes, so that nothing behind the last
 * row of a mapped file is touched; a ragged end is copied out first. */
#ifndef KERN_VECTOR_MATRIX_H
#define KERN_VECTOR_MATRIX_H

#include <string.h>

#include "kern/kern_const.h"
#include "kern/vector_codes.h"
#include "kern/vector_math.h"

/* ---- 16 columns ----------------------------------------------------------------------------- */

V16_FN v16 decode_16(num_mode mode, int bits, const uint8_t *p, v16_group g)
{
    switch (mode) {
    case NUM_F32: return v16_load((const float *)(const void *)p);
    case NUM_F16: return v16_from_f16(_mm256_loadu_si256((const void *)p));
    case NUM_BF16: return v16_from_bf16(_mm256_loadu_si256((const void *)p));
    case NUM_AFFINE: return v16_affine(bits, load_codes(p, bits), g);
    case NUM_MXFP4:
    case NUM_NVFP4: return v16_e2m1(load_codes(p, 4), g);
    default: return v16_scaled(v16_from_e4m3(load_codes(p, 8)), g);
    }
}

/* The first n < 16 columns at p, the rest zero. */
V16_FN v16 decode_few(num_mode mode, int bits, const uint8_t *p, int64_t n, v16_group g)
{
    uint8_t copy[64];
    v16_copy_bytes(copy, p, (n * bits + 7) / 8);
    return v16_first(decode_16(mode, bits, copy, g), n);
}

/* ---- scales --------------------------------------------------------------------------------- */

/* Scales and biases are widened 16 groups at a time. */
enum { STRIP = 16 };

typedef struct strip {
    float scale[STRIP], bias[STRIP];
} strip;

typedef struct row_source {
    const uint8_t *codes, *scales, *biases;
} row_source;

V16_FN int dtype_bytes(num_dtype t)
{
    return t == NUM_DT_U8 ? 1 : t == NUM_DT_F32 ? 4 : 2;
}

V16_FN int64_t count_groups(num_mode mode, const num_matrix *w)
{
    return mode <= NUM_BF16 ? 1 : (w->cols + w->group - 1) / w->group;
}

V16_FN num_dtype scale_dtype(num_mode mode, const num_matrix *w)
{
    return mode == NUM_AFFINE || mode == NUM_FP8 ? w->scale_dtype : NUM_DT_U8;
}

V16_FN row_source row_at(num_mode mode, const num_matrix *w, int64_t row)
{
    row_source s = {.codes = w->codes + row * w->row_bytes};
    if (mode <= NUM_BF16) return s;
    int64_t first = (mode == NUM_FP8 ? row / w->tile_rows : row) * count_groups(mode, w);
    s.scales = w->scales + first * dtype_bytes(scale_dtype(mode, w));
    if (mode == NUM_AFFINE) s.biases = w->biases + first * dtype_bytes(w->bias_dtype);
    return s;
}

/* Numbers g .. g+n of an array of `dtype`; U8 means E8M0 or, with a divisor, E4M3. */
V16_FN v16 load_numbers(num_mode mode, const uint8_t *p, num_dtype dtype, int64_t g, int64_t n,
                        float divisor)
{
    int size = dtype_bytes(dtype);
    uint8_t copy[64];
    p += g * size;
    if (n < STRIP) {
        v16_copy_bytes(copy, p, n * size);
        p = copy;
    }
    if (mode == NUM_NVFP4)
        return v16_div(v16_from_e4m3(_mm_loadu_si128((const void *)p)), v16_set1(divisor));
    if (mode == NUM_MXFP4 || mode == NUM_MXFP8)
        return v16_from_e8m0(_mm_loadu_si128((const void *)p));
    if (dtype == NUM_DT_F32) return v16_load((const float *)(const void *)p);
    __m256i h = _mm256_loadu_si256((const void *)p);
    return dtype == NUM_DT_F16 ? v16_from_f16(h) : v16_from_bf16(h);
}

/* Groups g .. g+n of a row, 1 <= n <= STRIP. */
V16_FN void load_strip(num_mode mode, const num_matrix *w, row_source src, int64_t g, int64_t n,
                       strip *s)
{
    if (mode <= NUM_BF16) return;
    v16_store(s->scale, load_numbers(mode, src.scales, scale_dtype(mode, w), g, n, w->divisor));
    if (mode == NUM_AFFINE)
        v16_store(s->bias, load_numbers(mode, src.biases, w->bias_dtype, g, n, 1.0f));
}

V16_FN v16_group make_group(num_mode mode, int bits, const strip *s, int64_t g)
{
    if (mode <= NUM_BF16) return v16_scale_group(1.0f);
    if (mode == NUM_AFFINE) return v16_affine_group(bits, s->scale[g], s->bias[g]);
    if (mode == NUM_MXFP4 || mode == NUM_NVFP4) return v16_e2m1_group(s->scale[g]);
    return v16_scale_group(s->scale[g]);
}

/* ---- rows ----------------------------------------------------------------------------------- */

/* Columns that share a scale: fixed where the format fixes it, so that loops unroll. */
V16_FN int64_t group_size(num_mode mode, const num_matrix *w)
{
    if (mode <= NUM_BF16) return w->cols;
    return mode == NUM_NVFP4 ? 16 : mode == NUM_MXFP4 || mode == NUM_MXFP8 ? 32 : w->group;
}

V16_FN int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Only dense rows, whole-row groups and FP8's last tile end anywhere. */
V16_FN int64_t group_end(num_mode mode, int64_t end, int64_t cols)
{
    int whole = mode == NUM_NVFP4 || mode == NUM_MXFP4 || mode == NUM_MXFP8 || end < cols;
    return whole ? end : cols;
}

V16_FN void decode_group(num_mode mode, int bits, const uint8_t *codes, int64_t k, int64_t end,
                         v16_group values, float *out)
{
    for (; k + KERN_LANES <= end; k += KERN_LANES)
        v16_store(out + k, decode_16(mode, bits, codes + k * bits / 8, values));
    if (k < end) {
        v16 a = decode_few(mode, bits, codes + k * bits / 8, end - k, values);
        v16_store_n(out + k, a, end - k);
    }
}

V16_FN void decode_row(num_mode mode, int bits, const num_matrix *w, int64_t row, float *out)
{
    row_source src = row_at(mode, w, row);
    int64_t n_groups = count_groups(mode, w), group = group_size(mode, w);
    for (int64_t g = 0; g < n_groups; g += STRIP) {
        strip s;
        int64_t n = least(n_groups - g, STRIP);
        load_strip(mode, w, src, g, n, &s);
        for (int64_t i = 0; i < n; i++)
            decode_group(mode, bits, src.codes, (g + i) * group,
                         group_end(mode, (g + i + 1) * group, w->cols),
                         make_group(mode, bits, &s, i), out);
    }
}

/* Rows side by side, their number a constant: unrolled, so that sums stay in registers. */
#define EACH_ROW _Pragma("GCC unroll 8") for (int r = 0; r < n_rows; r++)

V16_FN void product_group(num_mode mode, int bits, int n_rows, const uint8_t *const *codes,
                          const strip *s, v16 *sum, const float *x, int64_t i, int64_t k,
                          int64_t end, const kern_ahead *ahead)
{
    v16_group values[V16_FUSED_ROWS];
    EACH_ROW values[r] = make_group(mode, bits, &s[r], i);
    for (; k + KERN_LANES <= end; k += KERN_LANES) {
        v16 a = v16_load(x + k);
        if (k * bits / 8 % 64 == 0)
            EACH_ROW kern_ask(ahead, KERN_ASKS, k * bits / 8 * n_rows + 64 * r);
        EACH_ROW sum[r] =
            v16_fma(decode_16(mode, bits, codes[r] + k * bits / 8, values[r]), a, sum[r]);
    }
    if (k >= end) return;
    v16 a = v16_load_n(x + k, end - k);
    EACH_ROW sum[r] =
        v16_fma(decode_few(mode, bits, codes[r] + k * bits / 8, end - k, values[r]), a, sum[r]);
}

/* y[r] = row (row + r) . x for r < n_rows, a constant: decoded in registers, never stored. */
V16_FN void product_rows(num_mode mode, int bits, const num_matrix *w, int64_t row, int n_rows,
                         const float *x, float *y)
{
    const uint8_t *codes[V16_FUSED_ROWS];
    strip s[V16_FUSED_ROWS];
    v16 sum[V16_FUSED_ROWS];
    EACH_ROW codes[r] = row_at(mode, w, row + r).codes;
    EACH_ROW sum[r] = v16_zero();
    int64_t n_groups = count_groups(mode, w), group = group_size(mode, w), cols = w->cols;
    kern_ahead ahead = kern_look_ahead(w, row, n_rows);
    for (int64_t g = 0; g < n_groups; g += STRIP) {
        int64_t n = least(n_groups - g, STRIP);
        EACH_ROW load_strip(mode, w, row_at(mode, w, row + r), g, n, &s[r]);
        for (int64_t i = 0; i < n; i++)
            product_group(mode, bits, n_rows, codes, s, sum, x, i, (g + i) * group,
                          group_end(mode, (g + i + 1) * group, cols), &ahead);
    }
    EACH_ROW y[r] = v16_sum(sum[r]);
}

V16_FN void product(num_mode mode, int bits, const num_matrix *w, int64_t row, int64_t n_rows,
                    const float *x, float *y)
{
    int64_t r = 0;
    for (; r + V16_FUSED_ROWS <= n_rows; r += V16_FUSED_ROWS)
        product_rows(mode, bits, w, row + r, V16_FUSED_ROWS, x, y + r);
    for (; r < n_rows; r++) product_rows(mode, bits, w, row + r, 1, x, y + r);
}

/* One function per mode and width: the constants above meet their values here. */
#define FORM(name, mode, bits)                                                                     \
    static void decode_##name(const num_matrix *w, int64_t row, float *out)                        \
    {                                                                                              \
        decode_row(mode, bits, w, row, out);                                                       \
    }                                                                                              \
    static void product_##name(const num_matrix *w, int64_t row, int64_t n_rows, const float *x,   \
                               float *y)                                                           \
    {                                                                                              \
        product(mode, bits, w, row, n_rows, x, y);                                                 \
    }

FORM(f32, NUM_F32, 32)
FORM(f16, NUM_F16, 16)
FORM(bf16, NUM_BF16, 16)
FORM(affine2, NUM_AFFINE, 2)
FORM(affine3, NUM_AFFINE, 3)
FORM(affine4, NUM_AFFINE, 4)
FORM(affine5, NUM_AFFINE, 5)
FORM(affine6, NUM_AFFINE, 6)
FORM(affine8, NUM_AFFINE, 8)
FORM(mxfp4, NUM_MXFP4, 4)
FORM(mxfp8, NUM_MXFP8, 8)
FORM(nvfp4, NUM_NVFP4, 4)
FORM(fp8, NUM_FP8, 8)

typedef struct form {
    void (*decode)(const num_matrix *w, int64_t row, float *out);
    void (*product)(const num_matrix *w, int64_t row, int64_t n_rows, const float *x, float *y);
} form;

#define FORM_OF(name)                                                                              \
    {                                                                                              \
        decode_##name, product_##name                                                              \
    }

/* NULL members where there is no vector code: widths and groups that nobody writes, and groups
 * that would end inside of 16 columns. */
static form form_of(const num_matrix *w)
{
    static const form modes[NUM_N_MODES] = {
        [NUM_F32] = FORM_OF(f32),     [NUM_F16] = FORM_OF(f16),     [NUM_BF16] = FORM_OF(bf16),
        [NUM_MXFP4] = FORM_OF(mxfp4), [NUM_MXFP8] = FORM_OF(mxfp8), [NUM_NVFP4] = FORM_OF(nvfp4),
        [NUM_FP8] = FORM_OF(fp8)};
    static const form affine[9] = {
        [2] = FORM_OF(affine2), [3] = FORM_OF(affine3), [4] = FORM_OF(affine4),
        [5] = FORM_OF(affine5), [6] = FORM_OF(affine6), [8] = FORM_OF(affine8)};
    int ragged = w->mode >= NUM_AFFINE && w->group % KERN_LANES != 0 && w->group < w->cols;
    if (ragged || w->group != group_size(w->mode, w)) return (form){0};
    return w->mode == NUM_AFFINE ? affine[w->bits] : modes[w->mode];
}

static void decode(const num_matrix *w, int64_t row, float *out)
{
    form f = form_of(w);
    if (f.decode)
        f.decode(w, row, out);
    else
        num_row_decode(w, row, out);
}

/* ---- products of decoded rows --------------------------------------------------------------- */

/* n_rows x n_tokens, both constants: all sums stay in registers. */
V16_FN void dot_block(const float *w, int64_t ldw, int n_rows, const float *x, int64_t ldx,
                      int n_tokens, int64_t cols, float *y, int64_t ldy)
{
    v16 sum[V16_DOT_ROWS][V16_DOT_TOKENS], b[V16_DOT_TOKENS];
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < n_tokens; t++) sum[r][t] = v16_zero();
    int64_t k = 0;
    for (; k + KERN_LANES <= cols; k += KERN_LANES) {
        for (int t = 0; t < n_tokens; t++) b[t] = v16_load(x + t * ldx + k);
        for (int r = 0; r < n_rows; r++) {
            v16 a = v16_load(w + r * ldw + k);
            for (int t = 0; t < n_tokens; t++) sum[r][t] = v16_fma(a, b[t], sum[r][t]);
        }
    }
    if (k < cols) {
        for (int t = 0; t < n_tokens; t++) b[t] = v16_load_n(x + t * ldx + k, cols - k);
        for (int r = 0; r < n_rows; r++) {
            v16 a = v16_load_n(w + r * ldw + k, cols - k);
            for (int t = 0; t < n_tokens; t++) sum[r][t] = v16_fma(a, b[t], sum[r][t]);
        }
    }
    for (int t = 0; t < n_tokens; t++)
        for (int r = 0; r < n_rows; r++) y[t * ldy + r] = v16_sum(sum[r][t]);
}

V16_FN void dot_rows(const float *w, int64_t ldw, int n_rows, const float *x, int64_t ldx,
                     int64_t n_x, int64_t cols, float *y, int64_t ldy)
{
    int64_t t = 0;
    for (; t + V16_DOT_TOKENS <= n_x; t += V16_DOT_TOKENS)
        dot_block(w, ldw, n_rows, x + t * ldx, ldx, V16_DOT_TOKENS, cols, y + t * ldy, ldy);
    const float *rest = x + t * ldx;
    switch (n_x - t) {
    case 3: dot_block(w, ldw, n_rows, rest, ldx, 3, cols, y + t * ldy, ldy); break;
    case 2: dot_block(w, ldw, n_rows, rest, ldx, 2, cols, y + t * ldy, ldy); break;
    case 1: dot_block(w, ldw, n_rows, rest, ldx, 1, cols, y + t * ldy, ldy); break;
    }
}

static void dots(const float *w, int64_t ldw, int n_rows, const float *x, int64_t ldx, int64_t n_x,
                 int64_t cols, float *y, int64_t ldy)
{
    int r = 0;
    for (; r + V16_DOT_ROWS <= n_rows; r += V16_DOT_ROWS)
        dot_rows(w + r * ldw, ldw, V16_DOT_ROWS, x, ldx, n_x, cols, y + r, ldy);
    for (; r < n_rows; r++) dot_rows(w + r * ldw, ldw, 1, x, ldx, n_x, cols, y + r, ldy);
}

static void product_any(const num_matrix *w, int64_t row, int64_t n_rows, const float *x, float *y,
                        float *scratch)
{
    form f = form_of(w);
    if (f.product) {
        f.product(w, row, n_rows, x, y);
        return;
    }
    for (int64_t r = 0; r < n_rows; r++) {
        num_row_decode(w, row + r, scratch);
        dots(scratch, w->cols, 1, x, w->cols, 1, w->cols, y + r, 1);
    }
}

#endif
