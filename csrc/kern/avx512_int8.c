/* Products with 8-bit activations in AVX-512 with VNNI and VBMI; int8.h says what they compute. */
#include "kern/int8.h"

#include <string.h>

#include "kern/int8_gemv512.h"
#include "kern/int8_panel512.h"

/* ---- rows of x ------------------------------------------------------------------------------ */

V16_FN void quantize_block(const float *x, int64_t b, int8_row row)
{
    v16 lo = v16_load(x), hi = v16_load(x + 16);
    __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(lo), magnitude),
                                       _mm512_and_si512(_mm512_castps_si512(hi), magnitude));
    uint32_t top = _mm512_reduce_max_epu32(largest);
    float inverse, largest_f;
    memcpy(&largest_f, &top, 4);
    int finite = top < 0x7f800000;
    float scale = int8_block_scale(largest_f, finite, &inverse);
    __mmask16 m = finite ? 0xffff : 0;
    __m512i q0 = _mm512_maskz_cvtps_epi32(m, v16_mul(lo, v16_set1(inverse)));
    __m512i q1 = _mm512_maskz_cvtps_epi32(m, v16_mul(hi, v16_set1(inverse)));
    __m256i q = _mm256_set_m128i(_mm512_cvtepi32_epi8(q1), _mm512_cvtepi32_epi8(q0));
    _mm256_storeu_si256((void *)(row.natural + b * INT8_BLOCK), q);
    __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4,
                                     6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    q = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(q, apart), 0xd8);
    int8_t *split = row.split + int8_split_at(b);
    _mm_storeu_si128((void *)split, _mm256_castsi256_si128(q));
    _mm_storeu_si128((void *)(split + 64), _mm256_extracti128_si256(q, 1));
    int sum0 = _mm512_reduce_add_epi32(q0), sum1 = _mm512_reduce_add_epi32(q1);
    row.scale[b] = scale;
    row.sum[b] = scale * (float)(sum0 + sum1);
    row.half[2 * b] = -INT8_E2M1_OFFSET * sum0;
    row.half[2 * b + 1] = -INT8_E2M1_OFFSET * sum1;
    row.offset[b] = -INT8_E2M1_OFFSET * (sum0 + sum1);
}

static void quantize(const float *x, int64_t cols, void *out)
{
    int8_row row = int8_row_at(out, cols);
    int64_t n = cols / INT8_BLOCK;
    if (n % INT8_PARTS) memset(out, 0, (size_t)kern_int8_bytes(cols));
    for (int64_t b = 0; b < n; b++) quantize_block(x + b * INT8_BLOCK, b, row);
}

/* ---- forms ---------------------------------------------------------------------------------- */

/* Panels of one layout, whatever they were decoded from. */
#define TILES(name, mode, nibbles)                                                                 \
    static void tile_##name(const char *panel, int64_t n_blocks, int64_t n_rows,                   \
                            const int8_row *x, int n_tokens, float *y, int64_t ldy)                \
    {                                                                                              \
        switch (n_tokens) {                                                                        \
        case 1: panel_tile(mode, nibbles, 1, panel, n_blocks, n_rows, x, y, ldy); break;           \
        case 2: panel_tile(mode, nibbles, 2, panel, n_blocks, n_rows, x, y, ldy); break;           \
        case 3: panel_tile(mode, nibbles, 3, panel, n_blocks, n_rows, x, y, ldy); break;           \
        case 4: panel_tile(mode, nibbles, 4, panel, n_blocks, n_rows, x, y, ldy); break;           \
        case 5: panel_tile(mode, nibbles, 5, panel, n_blocks, n_rows, x, y, ldy); break;           \
        default: panel_tile(mode, nibbles, 6, panel, n_blocks, n_rows, x, y, ldy); break;          \
        }                                                                                          \
    }

TILES(mxfp4, NUM_MXFP4, 1)
TILES(nvfp4, NUM_NVFP4, 1)
TILES(affine4, NUM_AFFINE, 1)
TILES(affine, NUM_AFFINE, 0)

typedef void tile_fn(const char *panel, int64_t n_blocks, int64_t n_rows, const int8_row *x,
                     int n_tokens, float *y, int64_t ldy);

typedef struct form {
    void (*gemv)(const num_matrix *w, int64_t row, int64_t n_rows, const char *x, int n_x, float *y,
                 int64_t ldy);
    void (*lay)(const num_matrix *w, int64_t first, int64_t n_rows, char *panel);
    tile_fn *tile;
} form;

/* One function per mode and width: the constants of the headers meet their values here. */
#define FORM(name, mode, bits)                                                                     \
    static void gemv_##name(const num_matrix *w, int64_t row, int64_t n_rows, const char *x,       \
                            int n_x, float *y, int64_t ldy)                                        \
    {                                                                                              \
        gemv_run(mode, bits, w, row, n_rows, x, n_x, y, ldy);                                      \
    }                                                                                              \
    static void lay_##name(const num_matrix *w, int64_t first, int64_t n_rows, char *panel)        \
    {                                                                                              \
        lay_panel(mode, bits, w, first, n_rows, panel);                                            \
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
        [2] = {gemv_affine2, lay_affine2, tile_affine},
        [3] = {gemv_affine3, lay_affine3, tile_affine},
        [4] = {gemv_affine4, lay_affine4, tile_affine4},
        [5] = {gemv_affine5, lay_affine5, tile_affine},
        [6] = {gemv_affine6, lay_affine6, tile_affine},
        [8] = {gemv_affine8, lay_affine8, tile_affine},
    };
    if (w->mode == NUM_AFFINE) return affine[w->bits].gemv ? &affine[w->bits] : NULL;
    return w->mode == NUM_MXFP4 ? &mxfp4 : &nvfp4;
}

/* ---- products ------------------------------------------------------------------------------- */

static void panel_products(const form *f, const num_matrix *w, int64_t n_rows, const char *panel,
                           const char *x, int64_t n_x, float *y, int64_t ldy)
{
    int64_t stride = kern_int8_bytes(w->cols), n_tiles = (n_x + PANEL_TOKENS - 1) / PANEL_TOKENS;
    for (int64_t i = 0, t = 0; i < n_tiles; i++) {
        int8_row rows[PANEL_TOKENS];
        int64_t n = (n_x - t + n_tiles - i - 1) / (n_tiles - i); /* tiles as even as can be */
        for (int64_t j = 0; j < n; j++)
            rows[j] = int8_row_at((char *)(uintptr_t)x + (t + j) * stride, w->cols);
        f->tile(panel, w->cols / INT8_BLOCK, n_rows, rows, (int)n, y + t * ldy, ldy);
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
    if (n_x <= GEMV_TOKENS) {
        f->gemv(w, row, n_rows, x, (int)n_x, y, ldy);
        return;
    }
    for (int64_t r = 0; r < n_rows; r += INT8_PANEL_ROWS) {
        int64_t n = least(n_rows - r, INT8_PANEL_ROWS);
        f->lay(w, row + r, n, scratch);
        panel_products(f, w, n, scratch, x, n_x, y + r, ldy);
    }
}

const kern_int8_ops kern_avx512_int8 = {.quantize = quantize, .product = product};
