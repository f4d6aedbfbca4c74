/* Products of many quantized rows: 32 rows of w are laid out as a panel, four columns of each of 16
 * rows in a register, which is also how tiles want them. Here is how panels are laid out and how
 * sums of blocks are scaled; the sums are made by the including file, which defines PANEL_TOKENS,
 * the tokens that a panel meets at once. */
#ifndef KERN_INT8_PANEL512_H
#define KERN_INT8_PANEL512_H

#include "kern/int8_load512.h"
#include "kern/kern_const.h"

enum { PANEL_VECS = INT8_PANEL_ROWS / 16 };

/* A block of a panel: codes [8][2][16 rows][4 columns], two numbers [2][2][16]. Columns are in
 * order, or the even ones in the first half. */
enum { PANEL_STEP = INT8_PANEL_ROWS * 4, PANEL_NUMBERS = INT8_PANEL_ROWS * INT8_BLOCK };

#define EACH_16 _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++)

/* ---- laying out ----------------------------------------------------------------------------- */

/* Element j of row i becomes element i of row j. */
V16_FN void transpose_16(__m512i m[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(m[i], m[i + 1]);
        __m512i b = _mm512_unpackhi_epi32(m[i], m[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(m[i + 2], m[i + 3]);
        __m512i d = _mm512_unpackhi_epi32(m[i + 2], m[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
        __m512i b = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        __m512i c = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        m[i] = _mm512_shuffle_i32x4(a, b, 0x88);
        m[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
        m[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
        m[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
}

V16_FN const uint8_t *codes_at(const num_matrix *w, int64_t row, int64_t b, int bits)
{
    return w->codes + row * w->row_bytes + b * INT8_BLOCK * bits / 8;
}

V16_FN char *panel_block(char *panel, int64_t b)
{
    return panel + b * INT8_PANEL_BYTES;
}

/* Codes of 16 rows into vector `vec` of the panel. */
V16_FN void lay_nibbles(num_mode mode, int ordered, const unpacker *u, const num_matrix *w,
                        const int64_t *row, int vec, char *panel)
{
    int64_t n_blocks = w->cols / INT8_BLOCK;
    for (int64_t b = 0; b < n_blocks; b += 4) {
        __m512i m[16];
        __mmask64 here = first_bytes((n_blocks - b) * 16);
        EACH_16 m[i] = _mm512_maskz_loadu_epi8(here, codes_at(w, row[i], b, 4));
        transpose_16(m);
        EACH_16
        {
            char *out = panel_block(panel, b + i / 4) + vec * 64;
            if (b + i / 4 >= n_blocks) continue;
            if (ordered) {
                out += i % 4 * 2 * PANEL_STEP;
                _mm512_storeu_si512(out, first_nibbles(mode, u, m[i]));
                _mm512_storeu_si512(out + PANEL_STEP, last_nibbles(mode, u, m[i]));
            } else {
                out += i % 4 * PANEL_STEP;
                _mm512_storeu_si512(out, low_nibbles(mode, u, m[i]));
                _mm512_storeu_si512(out + 4 * PANEL_STEP, high_nibbles(mode, u, m[i]));
            }
        }
    }
}

/* The same for other codes that come apart as even and odd columns. */
V16_FN void lay_apart(num_mode mode, int bits, const unpacker *u, const num_matrix *w,
                      const int64_t *row, int vec, char *panel)
{
    int64_t n_blocks = w->cols / INT8_BLOCK;
    for (int64_t b = 0; b < n_blocks; b += 4) {
        int64_t n = least(128, (n_blocks - b) * INT8_BLOCK);
        _Pragma("GCC unroll 2") for (int odd = 0; odd < 2; odd++)
        {
            __m512i m[16];
            EACH_16
            {
                __m512i code[2];
                codes_apart(mode, bits, u, codes_at(w, row[i], b, bits), n, code);
                m[i] = odd ? code[1] : code[0];
            }
            transpose_16(m);
            EACH_16 if (b + i / 4 < n_blocks) _mm512_storeu_si512(
                panel_block(panel, b + i / 4) + (4 * odd + i % 4) * PANEL_STEP + vec * 64, m[i]);
        }
    }
}

V16_FN void lay_codes(int bits, const unpacker *u, const num_matrix *w, const int64_t *row, int vec,
                      char *panel)
{
    int64_t n_blocks = w->cols / INT8_BLOCK;
    for (int64_t b = 0; b < n_blocks; b += 2) {
        __m512i m[16];
        int64_t n = least(64, (n_blocks - b) * INT8_BLOCK);
        EACH_16 m[i] = codes_in_order(bits, u, codes_at(w, row[i], b, bits), n);
        transpose_16(m);
        EACH_16 if (b + i / 8 < n_blocks) _mm512_storeu_si512(
            panel_block(panel, b + i / 8) + i % 8 * PANEL_STEP + vec * 64, m[i]);
    }
}

/* Numbers of 16 rows: `per_number` blocks share one, or two halves of a block have theirs. */
V16_FN void lay_numbers(num_mode mode, const number_source *s, const num_matrix *w,
                        const int64_t *row, int vec, int slot, char *panel)
{
    int64_t n_groups = int8_n_groups(w), per_number = w->group / INT8_BLOCK;
    for (int64_t g = 0; g < n_groups; g += 16) {
        __m512i m[16];
        int64_t n = least(16, n_groups - g);
        EACH_16 m[i] = _mm512_castps_si512(load_numbers(mode, s, row[i], g, n));
        transpose_16(m);
        for (int64_t i = 0; i < n; i++) {
            if (mode == NUM_NVFP4) {
                char *out = panel_block(panel, (g + i) / 2) + PANEL_NUMBERS + (g + i) % 2 * 128;
                _mm512_storeu_si512(out + vec * 64, m[i]);
                continue;
            }
            char *out = panel_block(panel, (g + i) * per_number) + PANEL_NUMBERS + slot * 128;
            for (int64_t b = 0; b < per_number; b++)
                _mm512_storeu_si512(panel_block(out, b) + vec * 64, m[i]);
        }
    }
}

V16_FN void lay_panel(num_mode mode, int bits, int ordered, const num_matrix *w, int64_t first,
                      int64_t n_rows, char *panel)
{
    unpacker u = ordered ? ordered_unpacker(mode, bits) : make_unpacker(mode, bits);
    number_source scales = scales_of(mode, w);
    for (int vec = 0; vec < PANEL_VECS; vec++) {
        int64_t row[16];
        EACH_16 row[i] = first + least(vec * 16 + i, n_rows - 1);
        if (has_nibbles(mode, bits))
            lay_nibbles(mode, ordered, &u, w, row, vec, panel);
        else if (is_split(mode, bits) && !ordered)
            lay_apart(mode, bits, &u, w, row, vec, panel);
        else
            lay_codes(bits, &u, w, row, vec, panel);
        lay_numbers(mode, &scales, w, row, vec, 0, panel);
        if (mode == NUM_AFFINE) {
            number_source biases = biases_of(w);
            lay_numbers(mode, &biases, w, row, vec, 1, panel);
        }
    }
}

/* ---- what products share -------------------------------------------------------------------- */

#define EACH_VEC _Pragma("GCC unroll 2") for (int v = 0; v < PANEL_VECS; v++)
/* n_tokens is a constant, at most PANEL_TOKENS */
#define EACH_TOKEN_HERE _Pragma("GCC unroll 12") for (int t = 0; t < n_tokens; t++)

/* Sums of 16 rows for each token. */
typedef v16 panel_sums[PANEL_VECS][PANEL_TOKENS];
typedef __m512i panel_ints[PANEL_VECS][PANEL_TOKENS];

/* Tokens of a tile: the first one's row, and the bytes from each to the next. One distance for all
 * arrays of a row keeps addresses in registers. */
typedef struct tile_rows {
    int8_row first;
    int64_t stride;
} tile_rows;

V16_FN int32_t int_of(const void *p, int64_t at)
{
    int32_t i;
    memcpy(&i, (const char *)p + at, 4);
    return i;
}
V16_FN v16 float_of(const void *p, int64_t at)
{
    return _mm512_castsi512_ps(_mm512_set1_epi32(int_of(p, at)));
}

/* Number `slot` of the rows of a block. */
V16_FN v16 panel_number(const char *block, int slot, int v)
{
    return v16_load((const float *)(const void *)(block + PANEL_NUMBERS + slot * 128 + v * 64));
}

V16_FN void add_scaled(int n_tokens, const char *block, int slot, const float *scale,
                       int64_t stride, panel_ints d, panel_sums sum)
{
    v16 w[PANEL_VECS];
    EACH_VEC w[v] = panel_number(block, slot, v);
    EACH_TOKEN_HERE
    {
        v16 x = float_of(scale, t * stride);
        EACH_VEC sum[v][t] = v16_fma(_mm512_cvtepi32_ps(d[v][t]), v16_mul(w[v], x), sum[v][t]);
    }
}

V16_FN void add_biased(int n_tokens, const char *block, const float *x_sum, int64_t stride,
                       panel_sums sum)
{
    v16 w[PANEL_VECS];
    EACH_VEC w[v] = panel_number(block, 1, v);
    EACH_TOKEN_HERE
    {
        v16 x = float_of(x_sum, t * stride);
        EACH_VEC sum[v][t] = v16_fma(w[v], x, sum[v][t]);
    }
}

V16_FN void add_parts(int n_tokens, panel_sums part[INT8_PARTS], int64_t n_rows, float *y,
                      int64_t ldy)
{
    EACH_VEC EACH_TOKEN_HERE
    {
        v16 all =
            v16_add(v16_add(part[0][v][t], part[2][v][t]), v16_add(part[1][v][t], part[3][v][t]));
        int64_t n = n_rows - 16 * v;
        if (n > 0) v16_store_n(y + t * ldy + 16 * v, v16_add(all, v16_zero()), n < 16 ? n : 16);
    }
}

/* ---- what is read next ---------------------------------------------------------------------- */

/* The codes of the next panel, asked for while tokens meet this one: laying out would want them
 * from memory faster than it gives them, products leave it idle. A tile's block b asks for `step`
 * bytes from `at + b * step` on, but for nothing from `end` on. */
typedef struct soon {
    uintptr_t at, end, step; /* addresses, see kern_ahead */
} soon;

/* The tiles that ask: the last ones, as many tokens push out of the cache what comes too early. */
enum { SOON_TILES = 8 };

V16_FN void ask(const soon *s, int64_t b)
{
    uintptr_t at = s->at + (uintptr_t)b * s->step;
    uintptr_t end = at + s->step < s->end ? at + s->step : s->end;
    for (; at < end; at += 64) kern_prefetch(at);
}

/* What tile i of n_tiles asks for, if the next panel begins at `row`. */
V16_FN soon soon_at(const num_matrix *w, int64_t row, int64_t i, int64_t n_tiles)
{
    int64_t n_bytes = least(INT8_PANEL_ROWS, w->rows - row) * w->row_bytes;
    int64_t n_asking = least(n_tiles, SOON_TILES), n_blocks = w->cols / INT8_BLOCK;
    int64_t asked = i - (n_tiles - n_asking), lines = n_asking * n_blocks * 64;
    uintptr_t codes = kern_address(w->codes, row * w->row_bytes);
    if (asked < 0) return (soon){codes, codes, 0};
    int64_t step = (n_bytes + lines - 1) / lines * 64;
    return (soon){codes + (uintptr_t)(asked * n_blocks * step), codes + (uintptr_t)n_bytes,
                  (uintptr_t)step};
}

/* Its scales and biases, which are few. */
V16_FN void ask_numbers(const num_matrix *w, int64_t row)
{
    int64_t n = least(INT8_PANEL_ROWS, w->rows - row);
    number_source s = scales_of(w->mode, w);
    kern_prefetch_all(s.data, row * s.row_bytes, n * s.row_bytes);
    if (w->mode != NUM_AFFINE) return;
    s = biases_of(w);
    kern_prefetch_all(s.data, row * s.row_bytes, n * s.row_bytes);
}

/* ---- tiles ---------------------------------------------------------------------------------- */

/* A panel times n_tokens, with the sums of `n_rows` of its rows to y. */
typedef void tile_fn(const char *panel, int64_t n_blocks, int64_t n_rows, const tile_rows *x,
                     int n_tokens, const soon *next, float *y, int64_t ldy);

/* Tokens from t on. */
V16_FN tile_rows tile_rows_at(const char *x, int64_t t, int64_t cols)
{
    int64_t stride = kern_int8_bytes(cols);
    return (tile_rows){int8_row_at((char *)(uintptr_t)x + t * stride, cols), stride};
}

#endif
