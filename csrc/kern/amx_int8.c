/* Products with 8-bit activations in AMX tiles, scaled by AVX-512; int8.h says what they compute.
 *
 * A tile product is tokens x columns times columns x 16 rows of w: the layout of a panel is what
 * the second operand needs, and a row of the result is 16 rows of w for one token, scaled as the
 * sums of the VNNI kernels are. Columns are those of one scale: 32, or 16 under nvfp4.
 *
 * Inline assembly, since the tile intrinsics of gcc 12 say too little about the memory they read:
 * stores before them get lost. */
#include "kern/int8.h"

#include <string.h>

/* 24 sums in registers leave as many as scaling needs; fewer load operands oftener. */
enum { PANEL_TOKENS = 12 };
#include "kern/int8_panel512.h"

/* Fewer tokens do not pay for configuring and filling tiles. */
enum { LEAST_TOKENS = 8 };

/* Results are scaled this many products after they were stored, so that neither the tile unit nor
 * the vector units wait for the other; a ring of buffers holds what is under way. */
enum { LEAD = 2 };

/* ---- tiles ---------------------------------------------------------------------------------- */

/* 0 and 1 are results, 2 tokens, 3 and 4 rows of w. SDM volume 1, 18.2: palette 1. */
typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

V16_FN void configure(int n_tokens, int cols)
{
    uint8_t n = (uint8_t)n_tokens, quads = (uint8_t)(cols / 4);
    tile_config c = {.palette = 1,
                     .row_bytes = {64, 64, (uint16_t)cols, 64, 64},
                     .rows = {n, n, n, quads, quads}};
    __asm__ volatile("ldtilecfg %0" : : "m"(c) : "memory");
}

/* Leaves nothing for the kernel to save when it switches threads. */
V16_FN void release(void)
{
    __asm__ volatile("tilerelease" : : : "memory");
}

#define MULTIPLY(dot)                                                                              \
    "tilezero %%tmm0\n\t"                                                                          \
    "tilezero %%tmm1\n\t"                                                                          \
    "tileloadd (%[x],%[x_step]), %%tmm2\n\t"                                                       \
    "tileloadd (%[w],%[w_step]), %%tmm3\n\t"                                                       \
    "tileloadd 64(%[w],%[w_step]), %%tmm4\n\t" dot " %%tmm3, %%tmm2, %%tmm0\n\t" dot               \
    " %%tmm4, %%tmm2, %%tmm1"

/* Tokens at q times a panel's codes, which are unsigned in affine matrices. */
V16_FN void multiply(num_mode mode, const char *codes, const int8_t *q, int64_t stride)
{
    int64_t step = PANEL_STEP;
    if (mode == NUM_AFFINE)
        __asm__ volatile(MULTIPLY("tdpbsud")
                         :
                         : [x] "r"(q), [x_step] "r"(stride), [w] "r"(codes), [w_step] "r"(step)
                         : "memory");
    else
        __asm__ volatile(MULTIPLY("tdpbssd")
                         :
                         : [x] "r"(q), [x_step] "r"(stride), [w] "r"(codes), [w_step] "r"(step)
                         : "memory");
}

typedef int32_t tile_result[PANEL_VECS][PANEL_TOKENS][16];

V16_FN void store(tile_result *d)
{
    int64_t step = 64;
    __asm__ volatile("tilestored %%tmm0, (%[d],%[step])\n\t"
                     "tilestored %%tmm1, %c[next](%[d],%[step])"
                     :
                     : [d] "r"(d), [step] "r"(step), [next] "i"(PANEL_TOKENS * 64)
                     : "memory");
}

/* ---- panels --------------------------------------------------------------------------------- */

/* Products of a block: one for each scale. */
V16_FN int n_halves(num_mode mode)
{
    return mode == NUM_NVFP4 ? 2 : 1;
}

/* A panel times n_tokens, a constant, in tiles that are configured for them. One part of the sums
 * after the other; a part's product i is of its block i / halves. */
V16_FN void panel_tile(num_mode mode, int n_tokens, const char *panel, int64_t n_blocks,
                       int64_t n_rows, const tile_rows *x, const soon *next_panel, float *y,
                       int64_t ldy)
{
    panel_sums part[INT8_PARTS];
    _Alignas(64) tile_result ring[LEAD];
    int halves = n_halves(mode);
    int64_t stride = x->stride;
    for (int p = 0; p < INT8_PARTS; p++) {
        int64_t n = (n_blocks - p + INT8_PARTS - 1) / INT8_PARTS * halves;
        panel_sums sum;
        EACH_VEC EACH_TOKEN_HERE sum[v][t] = v16_zero();
        for (int64_t i = -LEAD; i < n; i++) {
            int64_t next = i + LEAD, ahead = p + next / halves * INT8_PARTS, h = next % halves;
            if (next < n && h == 0) ask(next_panel, ahead);
            if (next < n)
                multiply(mode, panel + ahead * INT8_PANEL_BYTES + h * 4 * PANEL_STEP,
                         x->first.natural + ahead * INT8_BLOCK + h * 16, stride);
            if (i >= 0) {
                int64_t b = p + i / halves * INT8_PARTS;
                const char *block = panel + b * INT8_PANEL_BYTES;
                panel_ints d;
                EACH_VEC EACH_TOKEN_HERE d[v][t] = _mm512_load_si512(ring[i % LEAD][v][t]);
                add_scaled(n_tokens, block, (int)(i % halves), x->first.scale + b, stride, d, sum);
                if (mode == NUM_AFFINE) add_biased(n_tokens, block, x->first.sum + b, stride, sum);
            }
            if (next < n) store(&ring[next % LEAD]);
        }
        EACH_VEC EACH_TOKEN_HERE part[p][v][t] = sum[v][t];
    }
    add_parts(n_tokens, part, n_rows, y, ldy);
}

/* ---- forms ---------------------------------------------------------------------------------- */

#define TILE(mode, n) panel_tile(mode, n, panel, n_blocks, n_rows, x, next, y, ldy)

/* LEAST_TOKENS and more make tiles of no fewer than seven tokens: 13 are two of them. */
#define TILES(name, mode)                                                                          \
    static void tile_##name(const char *panel, int64_t n_blocks, int64_t n_rows,                   \
                            const tile_rows *x, int n_tokens, const soon *next, float *y,          \
                            int64_t ldy)                                                           \
    {                                                                                              \
        switch (n_tokens) {                                                                        \
        case 7: TILE(mode, 7); break;                                                              \
        case 8: TILE(mode, 8); break;                                                              \
        case 9: TILE(mode, 9); break;                                                              \
        case 10: TILE(mode, 10); break;                                                            \
        case 11: TILE(mode, 11); break;                                                            \
        default: TILE(mode, 12); break;                                                            \
        }                                                                                          \
    }

TILES(mxfp4, NUM_MXFP4)
TILES(nvfp4, NUM_NVFP4)
TILES(affine, NUM_AFFINE)

typedef struct form {
    void (*lay)(const num_matrix *w, int64_t first, int64_t n_rows, char *panel);
    tile_fn *tile;
} form;

#define LAY(name, mode, bits)                                                                      \
    static void lay_##name(const num_matrix *w, int64_t first, int64_t n_rows, char *panel)        \
    {                                                                                              \
        lay_panel(mode, bits, 1, w, first, n_rows, panel);                                         \
    }

LAY(affine2, NUM_AFFINE, 2)
LAY(affine3, NUM_AFFINE, 3)
LAY(affine4, NUM_AFFINE, 4)
LAY(affine5, NUM_AFFINE, 5)
LAY(affine6, NUM_AFFINE, 6)
LAY(affine8, NUM_AFFINE, 8)
LAY(mxfp4, NUM_MXFP4, 4)
LAY(nvfp4, NUM_NVFP4, 4)

/* NULL for widths that nobody writes. */
static const form *form_of(const num_matrix *w)
{
    static const form mxfp4 = {lay_mxfp4, tile_mxfp4}, nvfp4 = {lay_nvfp4, tile_nvfp4};
    static const form affine[9] = {
        [2] = {lay_affine2, tile_affine}, [3] = {lay_affine3, tile_affine},
        [4] = {lay_affine4, tile_affine}, [5] = {lay_affine5, tile_affine},
        [6] = {lay_affine6, tile_affine}, [8] = {lay_affine8, tile_affine},
    };
    if (w->mode == NUM_AFFINE) return affine[w->bits].lay ? &affine[w->bits] : NULL;
    return w->mode == NUM_MXFP4 ? &mxfp4 : &nvfp4;
}

/* ---- products ------------------------------------------------------------------------------- */

/* Tiles are configured for n tokens: the last ones may meet some that were met before, and give
 * the same numbers again. */
static void panel_products(tile_fn *tile, const num_matrix *w, int64_t row, int64_t n_rows,
                           const char *panel, const char *x, int64_t n_x, int64_t n, float *y,
                           int64_t ldy)
{
    int64_t n_tiles = (n_x + n - 1) / n;
    ask_numbers(w, row + n_rows);
    for (int64_t i = 0; i < n_tiles; i++) {
        int64_t t = least(i * n, n_x - n);
        tile_rows rows = tile_rows_at(x, t, w->cols);
        soon next = soon_at(w, row + n_rows, i, n_tiles);
        tile(panel, w->cols / INT8_BLOCK, n_rows, &rows, (int)n, &next, y + t * ldy, ldy);
    }
}

static void product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch)
{
    const form *f = form_of(w);
    if (!f || n_x < LEAST_TOKENS) {
        kern_avx512_int8.product(w, row, n_rows, x, n_x, y, ldy, scratch);
        return;
    }
    int64_t n_tiles = (n_x + PANEL_TOKENS - 1) / PANEL_TOKENS, n = (n_x + n_tiles - 1) / n_tiles;
    configure((int)n, INT8_BLOCK / n_halves(w->mode));
    for (int64_t r = 0; r < n_rows; r += INT8_PANEL_ROWS) {
        int64_t here = least(n_rows - r, INT8_PANEL_ROWS);
        f->lay(w, row + r, here, scratch);
        panel_products(f->tile, w, row + r, here, scratch, x, n_x, n, y + r, ldy);
    }
    release();
}

static void quantize(const float *x, int64_t cols, void *row)
{
    kern_avx512_int8.quantize(x, cols, row);
}

const kern_int8_ops kern_amx_int8 = {.quantize = quantize, .product = product};
