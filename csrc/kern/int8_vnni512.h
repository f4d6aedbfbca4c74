/* Products with 8-bit activations in AVX-512 with VNNI; int8.h says what they compute. The table is
 * INT8_TABLE of the including file, which the build gives VBMI or not. */
#ifndef KERN_INT8_VNNI512_H
#define KERN_INT8_VNNI512_H

#include "kern/int8.h"

#include <string.h>

#include "kern/int8_gemv512.h"

enum { PANEL_TOKENS = 6 };
#include "kern/int8_panel512.h"

/* ---- rows of x ------------------------------------------------------------------------------ */

/* The largest magnitudes of four blocks, as bits of an f32. */
V16_FN __m128i largest_of(const float *x)
{
    __m512i magnitude = _mm512_set1_epi32(0x7fffffff), m[4];
    for (int i = 0; i < 4; i++) {
        __m512i lo = _mm512_loadu_si512(x + i * 32), hi = _mm512_loadu_si512(x + i * 32 + 16);
        m[i] = _mm512_max_epu32(_mm512_and_si512(lo, magnitude), _mm512_and_si512(hi, magnitude));
    }
    __m512i a =
        _mm512_max_epu32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
    __m512i c =
        _mm512_max_epu32(_mm512_unpacklo_epi32(m[2], m[3]), _mm512_unpackhi_epi32(m[2], m[3]));
    a = _mm512_max_epu32(_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
    a = _mm512_max_epu32(a, _mm512_shuffle_i32x4(a, a, 0x4e));
    return _mm512_castsi512_si128(_mm512_max_epu32(a, _mm512_shuffle_i32x4(a, a, 0xb1)));
}

/* Blocks b .. b + 4 from their 128 columns. */
V16_FN void quantize_four(const float *x, int64_t b, int8_row row)
{
    __m128i top = largest_of(x);
    __m128 largest = _mm_castsi128_ps(top), all = _mm_set1_ps(127.0f);
    __mmask8 finite = _mm_cmplt_epu32_mask(top, _mm_set1_epi32(0x7f800000));
    __mmask8 counts = _mm_cmp_ps_mask(largest, _mm_set1_ps(INT8_LEAST), _CMP_GE_OQ);
    __m128 inverse = _mm_maskz_div_ps(counts & finite, all, largest);
    __m128 scale = _mm_maskz_div_ps(counts, largest, all);
    scale = _mm_mask_mov_ps(_mm_set1_ps(NAN), finite, scale);

    __m512i q[8];
    float factor[4];
    _mm_storeu_ps(factor, inverse);
    for (int i = 0; i < 8; i++) {
        __mmask16 m = finite >> i / 2 & 1 ? 0xffff : 0;
        q[i] = _mm512_maskz_cvtps_epi32(m, v16_mul(v16_load(x + 16 * i), v16_set1(factor[i / 2])));
    }
    __m512i order = SETR(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes[2];
    for (int i = 0; i < 2; i++) {
        __m512i lo = _mm512_packs_epi32(q[4 * i], q[4 * i + 1]);
        __m512i hi = _mm512_packs_epi32(q[4 * i + 2], q[4 * i + 3]);
        bytes[i] = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(lo, hi));
        _mm512_storeu_si512(row.natural + b * INT8_BLOCK + 64 * i, bytes[i]);
    }

    __m512i parity =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    __m512i a = _mm512_shuffle_epi8(bytes[0], parity), c = _mm512_shuffle_epi8(bytes[1], parity);
    __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    __m512i odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    int8_t *split = row.split + int8_split_at(b);
    _mm512_storeu_si512(split, _mm512_permutex2var_epi64(a, even, c));
    _mm512_storeu_si512(split + 64, _mm512_permutex2var_epi64(a, odd, c));

    /* Sums of 16 columns: each lane's four, then lanes gathered from both registers. */
    __m512i zero = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1), s[2];
    for (int i = 0; i < 2; i++) {
        s[i] = _mm512_dpbusd_epi32(zero, ones, bytes[i]);
        s[i] = _mm512_add_epi32(s[i], _mm512_shuffle_epi32(s[i], _MM_PERM_BADC));
        s[i] = _mm512_add_epi32(s[i], _mm512_shuffle_epi32(s[i], _MM_PERM_CDAB));
    }
    __m512i lanes = SETR(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
    __m256i half = _mm512_castsi512_si256(_mm512_permutex2var_epi32(s[0], lanes, s[1]));
    __m128i sum = _mm_hadd_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm256_storeu_si256((void *)(row.half + 2 * b),
                        _mm256_mullo_epi32(half, _mm256_set1_epi32(-INT8_E2M1_OFFSET)));
    _mm_storeu_si128((void *)(row.offset + b),
                     _mm_mullo_epi32(sum, _mm_set1_epi32(-INT8_E2M1_OFFSET)));
    _mm_storeu_ps(row.scale + b, scale);
    _mm_storeu_ps(row.sum + b, _mm_mul_ps(scale, _mm_cvtepi32_ps(sum)));
}

/* The exponents of the least and the largest scale. */
static void find_range(int8_row row, int64_t n_blocks)
{
    uint32_t low = UINT32_MAX, high = 0; /* no scale is negative: their bits have their order */
    for (int64_t b = 0; b < n_blocks; b++) {
        uint32_t bits;
        memcpy(&bits, row.scale + b, sizeof bits);
        low = bits < low ? bits : low;
        high = bits > high ? bits : high;
    }
    row.range[0] = (int32_t)(low >> 23);
    row.range[1] = (int32_t)(high >> 23);
}

static void quantize(const float *x, int64_t cols, void *out)
{
    enum { FOUR = INT8_PARTS * INT8_BLOCK };
    int8_row row = int8_row_at(out, cols);
    int64_t k = 0;
    for (; k + FOUR <= cols; k += FOUR) quantize_four(x + k, k / INT8_BLOCK, row);
    if (k < cols) {
        float last[FOUR] = {0};
        memcpy(last, x + k, (size_t)(cols - k) * sizeof *last);
        quantize_four(last, k / INT8_BLOCK, row);
    }
    find_range(row, cols / INT8_BLOCK);
}

/* ---- scales that are powers of two ---------------------------------------------------------- */

/* Exponents of f32 numbers: those of zeros are 0, of infinities and NaN 255. */
typedef struct exponents {
    int least, most;
} exponents;

/* Of the scales of n_rows rows of w, an mxfp4 matrix. */
static exponents weight_exponents(const num_matrix *w, int64_t row, int64_t n_rows)
{
    const uint8_t *codes = w->scales + row * int8_n_groups(w);
    uint8_t low = 255, high = 0;
    for (int64_t i = 0; i < n_rows * int8_n_groups(w); i++) {
        low = codes[i] < low ? codes[i] : low;
        high = codes[i] > high ? codes[i] : high;
    }
    return (exponents){low - 1, high == 255 ? 255 : high - 1}; /* the gain is 1/2 */
}

/* Of the scales of a tile's n rows. */
static exponents row_exponents(const tile_rows *x, int64_t n)
{
    exponents all = {255, 0};
    for (int64_t t = 0; t < n; t++) {
        int32_t range[2];
        memcpy(range, (const char *)x->first.range + t * x->stride, sizeof range);
        all.least = range[0] < all.least ? range[0] : all.least;
        all.most = range[1] > all.most ? range[1] : all.most;
    }
    return all;
}

/* Whether all products are normal numbers, so that adding exponents is multiplying. */
static int adds_exponents(exponents w, exponents x)
{
    return w.least > 0 && w.most < 255 && x.least > 0 && x.most < 255 && w.least + x.least > 127 &&
           w.most + x.most < 127 + 255;
}

/* add_scaled without a multiplication, which would take turns with the products. */
V16_FN void add_shifted(int n_tokens, const char *block, const float *scale, int64_t stride,
                        panel_ints d, panel_sums sum)
{
    __m512i w[PANEL_VECS], one = _mm512_set1_epi32(0x3f800000);
    EACH_VEC w[v] = _mm512_sub_epi32(_mm512_castps_si512(panel_number(block, 0, v)), one);
    EACH_TOKEN_HERE
    {
        __m512i x = _mm512_set1_epi32(int_of(scale, t * stride));
        EACH_VEC
        {
            v16 both = _mm512_castsi512_ps(_mm512_add_epi32(w[v], x));
            sum[v][t] = v16_fma(_mm512_cvtepi32_ps(d[v][t]), both, sum[v][t]);
        }
    }
}

/* ---- panels --------------------------------------------------------------------------------- */

/* d[v][t] += four columns of 16 rows times those of a token, for registers k of the block. */
V16_FN void add_columns(int n_tokens, const char *block, int k, const int8_t *q, int64_t stride,
                        panel_ints d)
{
    __m512i w[PANEL_VECS];
    EACH_VEC w[v] = _mm512_loadu_si512(block + k * PANEL_STEP + v * 64);
    EACH_TOKEN_HERE
    {
        __m512i x = _mm512_set1_epi32(int_of(q, t * stride));
        EACH_VEC d[v][t] = _mm512_dpbusd_epi32(d[v][t], w[v], x);
    }
}

/* The terms of one block. */
V16_FN void add_block(num_mode mode, int split, int shifts, int n_tokens, const char *block,
                      int64_t b, const tile_rows *x, panel_sums sum)
{
    panel_ints d;
    const int8_t *q = split ? x->first.split + int8_split_at(b) : x->first.natural + b * INT8_BLOCK;
    const float *scale = x->first.scale + b;
    int64_t stride = x->stride;
    if (mode == NUM_NVFP4) {
        for (int h = 0; h < 2; h++) {
            const int32_t *half = x->first.half + 2 * b + h;
            EACH_TOKEN_HERE EACH_VEC d[v][t] = _mm512_set1_epi32(int_of(half, t * stride));
            for (int k = 2 * h; k < 2 * h + 2; k++) {
                add_columns(n_tokens, block, k, q + 4 * k, stride, d);
                add_columns(n_tokens, block, k + 4, q + 64 + 4 * k, stride, d);
            }
            add_scaled(n_tokens, block, h, scale, stride, d, sum);
        }
        return;
    }
    const int32_t *offset = x->first.offset + b;
    EACH_TOKEN_HERE EACH_VEC d[v][t] =
        mode == NUM_MXFP4 ? _mm512_set1_epi32(int_of(offset, t * stride)) : _mm512_setzero_si512();
    _Pragma("GCC unroll 8") for (int k = 0; k < 8; k++)
        add_columns(n_tokens, block, k, q + (split ? k / 4 * 64 + k % 4 * 4 : 4 * k), stride, d);
    if (shifts)
        add_shifted(n_tokens, block, scale, stride, d, sum);
    else
        add_scaled(n_tokens, block, 0, scale, stride, d, sum);
    if (mode == NUM_AFFINE) add_biased(n_tokens, block, x->first.sum + b, stride, sum);
}

/* A panel times n_tokens, a constant. One part of the sums after the other, so that as few as
 * possible are alive. */
V16_FN void panel_tile(num_mode mode, int split, int shifts, int n_tokens, const char *panel,
                       int64_t n_blocks, int64_t n_rows, const tile_rows *x, const soon *next,
                       float *y, int64_t ldy)
{
    panel_sums part[INT8_PARTS];
    for (int p = 0; p < INT8_PARTS; p++) {
        panel_sums sum;
        EACH_VEC EACH_TOKEN_HERE sum[v][t] = v16_zero();
        for (int64_t b = p; b < n_blocks; b += INT8_PARTS) {
            ask(next, b);
            add_block(mode, split, shifts, n_tokens, panel + b * INT8_PANEL_BYTES, b, x, sum);
        }
        EACH_VEC EACH_TOKEN_HERE part[p][v][t] = sum[v][t];
    }
    add_parts(n_tokens, part, n_rows, y, ldy);
}

/* ---- forms ---------------------------------------------------------------------------------- */

#define TILE(mode, split, shifts, n)                                                               \
    panel_tile(mode, split, shifts, n, panel, n_blocks, n_rows, x, next, y, ldy)

/* Panels of one layout, whatever they were decoded from. More than GEMV_WIDE_TOKENS make tiles of
 * no fewer than three: seven are two of them. */
#define TILES(name, mode, split, shifts)                                                           \
    static void tile_##name(const char *panel, int64_t n_blocks, int64_t n_rows,                   \
                            const tile_rows *x, int n_tokens, const soon *next, float *y,          \
                            int64_t ldy)                                                           \
    {                                                                                              \
        switch (n_tokens) {                                                                        \
        case 3: TILE(mode, split, shifts, 3); break;                                               \
        case 4: TILE(mode, split, shifts, 4); break;                                               \
        case 5: TILE(mode, split, shifts, 5); break;                                               \
        default: TILE(mode, split, shifts, 6); break;                                              \
        }                                                                                          \
    }

TILES(mxfp4, NUM_MXFP4, 1, 0)
TILES(shifted, NUM_MXFP4, 1, 1)
TILES(nvfp4, NUM_NVFP4, 1, 0)
TILES(apart, NUM_AFFINE, 1, 0)
TILES(affine, NUM_AFFINE, 0, 0)

typedef struct form {
    void (*gemv)(const num_matrix *w, int64_t row, int64_t n_rows, const char *x, int n_x, float *y,
                 int64_t ldy, int8_t *scratch);
    void (*lay)(const num_matrix *w, int64_t first, int64_t n_rows, char *panel);
    tile_fn *tile;
} form;

/* One function per mode and width: the constants of the headers meet their values here. */
#define FORM(name, mode, bits)                                                                     \
    static void gemv_##name(const num_matrix *w, int64_t row, int64_t n_rows, const char *x,       \
                            int n_x, float *y, int64_t ldy, int8_t *scratch)                       \
    {                                                                                              \
        gemv_run(mode, bits, w, row, n_rows, x, n_x, y, ldy, scratch);                             \
    }                                                                                              \
    static void lay_##name(const num_matrix *w, int64_t first, int64_t n_rows, char *panel)        \
    {                                                                                              \
        lay_panel(mode, bits, 0, w, first, n_rows, panel);                                         \
    }

FORM(affine2, NUM_AFFINE, 2)
FORM(affine3, NUM_AFFINE, 3)
FORM(affine4, NUM_AFFINE, 4)
FORM(affine5, NUM_AFFINE, 5)
FORM(affine6, NUM_AFFINE, 6)
FORM(affine8, NUM_AFFINE, 8)
FORM(mxfp4, NUM_MXFP4, 4)
FORM(nvfp4, NUM_NVFP4, 4)

/* NULL for widths that nobody writes. */
static const form *form_of(const num_matrix *w)
{
    static const form mxfp4 = {gemv_mxfp4, lay_mxfp4, tile_mxfp4};
    static const form nvfp4 = {gemv_nvfp4, lay_nvfp4, tile_nvfp4};
    static const form affine[9] = {
        [2] = {gemv_affine2, lay_affine2, tile_apart},
        [3] = {gemv_affine3, lay_affine3, tile_apart},
        [4] = {gemv_affine4, lay_affine4, tile_apart},
        [5] = {gemv_affine5, lay_affine5, tile_affine},
        [6] = {gemv_affine6, lay_affine6, tile_affine},
        [8] = {gemv_affine8, lay_affine8, tile_affine},
    };
    if (w->mode == NUM_AFFINE) return affine[w->bits].gemv ? &affine[w->bits] : NULL;
    return w->mode == NUM_MXFP4 ? &mxfp4 : &nvfp4;
}

/* ---- products ------------------------------------------------------------------------------- */

/* n_rows rows of w from `row` on, which are laid out in `panel`, times n_x tokens. */
static void panel_products(const form *f, const num_matrix *w, int64_t row, int64_t n_rows,
                           const char *panel, const char *x, int64_t n_x, float *y, int64_t ldy)
{
    int64_t n_tiles = (n_x + PANEL_TOKENS - 1) / PANEL_TOKENS, n_blocks = w->cols / INT8_BLOCK;
    int is_mxfp4 = w->mode == NUM_MXFP4;
    exponents of_w = {0, 0};
    if (is_mxfp4) of_w = weight_exponents(w, row, n_rows);
    ask_numbers(w, row + n_rows);
    for (int64_t i = 0, t = 0; i < n_tiles; i++) {
        int64_t n = (n_x - t + n_tiles - i - 1) / (n_tiles - i); /* tiles as even as can be */
        tile_rows rows = tile_rows_at(x, t, w->cols);
        int shifts = is_mxfp4 && adds_exponents(of_w, row_exponents(&rows, n));
        tile_fn *tile = shifts ? tile_shifted : f->tile;
        soon next = soon_at(w, row + n_rows, i, n_tiles);
        tile(panel, n_blocks, n_rows, &rows, (int)n, &next, y + t * ldy, ldy);
        t += n;
    }
}

static void product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch)
{
    const form *f = form_of(w);
    if (!f) {
        kern_scalar_int8.product(w, row, n_rows, x, n_x, y, ldy, scratch);
        return;
    }
    if (n_x <= (int8_has_nibbles(w) ? GEMV_TOKENS : GEMV_WIDE_TOKENS)) {
        f->gemv(w, row, n_rows, x, (int)n_x, y, ldy, scratch);
        return;
    }
    for (int64_t r = 0; r < n_rows; r += INT8_PANEL_ROWS) {
        int64_t n = least(n_rows - r, INT8_PANEL_ROWS);
        f->lay(w, row + r, n, scratch);
        panel_products(f, w, row + r, n, scratch, x, n_x, y + r, ldy);
    }
}

const kern_int8_ops INT8_TABLE = {.quantize = quantize, .product = product};

#endif
