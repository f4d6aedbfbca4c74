/* Products with 8-bit activations in AVX2; int8.h says what they compute. Rows of w are taken apart
 * into bytes and f32 scales, a few at a time, and meet all tokens then. */
#include "kern/int8.h"

#include <string.h>

#include "kern/v16_avx2.h"

/* Rows that are taken apart at once: as many as fit into the scratch of a panel. */
enum { ROWS = 8 };

/* A row of w: codes and, one for each block and each half of nvfp4's blocks, scales; biases. What
 * pads it to four blocks is zero. Codes of 8 bits have 128 taken off, so that sums of two products
 * stay within 16 bits; `moved` is what such codes are short of. */
typedef struct weight_row {
    uint8_t *codes;
    float *scales, *second; /* biases, or scales of second halves */
} weight_row;

static weight_row row_in(void *scratch, int r, int64_t n_blocks)
{
    char *p = (char *)scratch + r * n_blocks * (INT8_BLOCK + 8);
    float *scales = (float *)(void *)(p + n_blocks * INT8_BLOCK);
    return (weight_row){(uint8_t *)p, scales, scales + n_blocks};
}

/* ---- rows of w ------------------------------------------------------------------------------ */

/* 32 nibbles in order, E2M1 doubled and moved. */
V16_FN __m256i nibbles(int is_e2m1, const uint8_t *p)
{
    __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    __m128i raw = _mm_loadu_si128((const void *)p), mask = _mm_set1_epi8(15);
    __m128i lo = _mm_and_si128(raw, mask), hi = _mm_and_si128(_mm_srli_epi16(raw, 4), mask);
    __m256i c = _mm256_set_m128i(_mm_unpackhi_epi8(lo, hi), _mm_unpacklo_epi8(lo, hi));
    return is_e2m1 ? _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), c) : c;
}

static void take_apart(const num_matrix *w, int64_t row, int64_t n_blocks, weight_row out)
{
    int64_t n = w->cols / INT8_BLOCK, first = row * int8_n_groups(w);
    const uint8_t *p = w->codes + row * w->row_bytes;
    if (w->bits == 4)
        for (int64_t b = 0; b < n; b++)
            _mm256_storeu_si256((void *)(out.codes + b * INT8_BLOCK),
                                nibbles(w->mode != NUM_AFFINE, p + 16 * b));
    else
        int8_codes(w, row, out.codes);
    memset(out.codes + n * INT8_BLOCK, 0, (size_t)((n_blocks - n) * INT8_BLOCK));
    memset(out.scales, 0, (size_t)n_blocks * 2 * sizeof(float));
    for (int64_t b = 0; b < n; b++) {
        int64_t g = first + b * INT8_BLOCK / w->group;
        int same = b > 0 && b * INT8_BLOCK % w->group != 0;
        out.scales[b] = same ? out.scales[b - 1] : int8_scale(w, g);
        if (w->mode == NUM_NVFP4)
            out.second[b] = int8_scale(w, g + 1);
        else if (w->mode == NUM_AFFINE)
            out.second[b] = same ? out.second[b - 1] : num_element(w->biases, w->bias_dtype, g);
    }
}

/* ---- products ------------------------------------------------------------------------------- */

/* Eight sums of products of 32 codes. Those of 8 bits may be 255, too much for two products in 16
 * bits: they are taken as signed, and 128 times the sum of q is added. */
V16_FN __m256i dot_32(int wide, const uint8_t *codes, const int8_t *q)
{
    __m256i c = _mm256_loadu_si256((const void *)codes), x = _mm256_loadu_si256((const void *)q);
    __m256i ones = _mm256_set1_epi16(1);
    if (!wide) return _mm256_madd_epi16(_mm256_maddubs_epi16(c, x), ones);
    __m256i moved = _mm256_xor_si256(c, _mm256_set1_epi8(INT8_MIN));
    __m256i sums = _mm256_maddubs_epi16(_mm256_abs_epi8(moved), _mm256_sign_epi8(x, moved));
    __m256i all = _mm256_maddubs_epi16(_mm256_set1_epi8(64), x);
    __m256i d = _mm256_madd_epi16(sums, ones);
    return _mm256_add_epi32(d, _mm256_slli_epi32(_mm256_madd_epi16(all, ones), 1));
}

V16_FN __m128 add_term(__m128 sum, __m128i d, __m128 scale, __m128 x_scale)
{
    return _mm_fmadd_ps(_mm_cvtepi32_ps(d), _mm_mul_ps(scale, x_scale), sum);
}

/* Blocks b .. b + 4 of a row: the lanes of a sum are the parts of int8.h. */
V16_FN __m128 add_blocks(num_mode mode, int wide, weight_row w, int8_row x, int64_t b, __m128 sum)
{
    const uint8_t *c = w.codes + b * INT8_BLOCK;
    const int8_t *q = x.natural + b * INT8_BLOCK;
    __m256i d0 = dot_32(wide, c, q), d1 = dot_32(wide, c + 32, q + 32);
    __m256i d2 = dot_32(wide, c + 64, q + 64), d3 = dot_32(wide, c + 96, q + 96);
    __m256i d = _mm256_hadd_epi32(_mm256_hadd_epi32(d0, d1), _mm256_hadd_epi32(d2, d3));
    __m128i lo = _mm256_castsi256_si128(d), hi = _mm256_extracti128_si256(d, 1);
    __m128 scale = _mm_loadu_ps(w.scales + b), x_scale = _mm_loadu_ps(x.scale + b);
    __m128 second = _mm_loadu_ps(w.second + b);
    if (mode == NUM_NVFP4) {
        __m128 a = _mm_loadu_ps((const float *)(x.half + 2 * b));
        __m128 z = _mm_loadu_ps((const float *)(x.half + 2 * b + 4));
        __m128i even = _mm_castps_si128(_mm_shuffle_ps(a, z, 0x88));
        __m128i odd = _mm_castps_si128(_mm_shuffle_ps(a, z, 0xdd));
        sum = add_term(sum, _mm_add_epi32(lo, even), scale, x_scale);
        return add_term(sum, _mm_add_epi32(hi, odd), second, x_scale);
    }
    __m128i all = _mm_add_epi32(lo, hi);
    if (mode == NUM_MXFP4) all = _mm_add_epi32(all, _mm_loadu_si128((const void *)(x.offset + b)));
    sum = add_term(sum, all, scale, x_scale);
    return mode == NUM_AFFINE ? _mm_fmadd_ps(second, _mm_loadu_ps(x.sum + b), sum) : sum;
}

V16_FN float row_product(num_mode mode, int wide, weight_row w, int8_row x, int64_t n_blocks)
{
    __m128 sum = _mm_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b += INT8_PARTS) sum = add_blocks(mode, wide, w, x, b, sum);
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    sum = _mm_add_ss(sum, _mm_movehdup_ps(sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_setzero_ps()));
}

static float any_product(const num_matrix *m, weight_row w, int8_row x, int64_t n_blocks)
{
    switch (m->mode) {
    case NUM_MXFP4: return row_product(NUM_MXFP4, 0, w, x, n_blocks);
    case NUM_NVFP4: return row_product(NUM_NVFP4, 0, w, x, n_blocks);
    default: break;
    }
    if (m->bits > 6) return row_product(NUM_AFFINE, 1, w, x, n_blocks);
    return row_product(NUM_AFFINE, 0, w, x, n_blocks);
}

static void product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch)
{
    int64_t n_blocks = int8_n_blocks(w->cols), stride = kern_int8_bytes(w->cols);
    for (int64_t r = 0; r < n_rows; r += ROWS) {
        int n = (int)(n_rows - r < ROWS ? n_rows - r : ROWS);
        for (int i = 0; i < n; i++)
            take_apart(w, row + r + i, n_blocks, row_in(scratch, i, n_blocks));
        for (int64_t t = 0; t < n_x; t++) {
            int8_row q = int8_row_at((char *)(uintptr_t)x + t * stride, w->cols);
            for (int i = 0; i < n; i++)
                y[t * ldy + r + i] = any_product(w, row_in(scratch, i, n_blocks), q, n_blocks);
        }
    }
}

/* ---- rows of x ------------------------------------------------------------------------------ */

static void quantize(const float *x, int64_t cols, void *out)
{
    kern_scalar_int8.quantize(x, cols, out);
}

const kern_int8_ops kern_avx2_int8 = {.quantize = quantize, .product = product};
