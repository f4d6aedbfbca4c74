/* Products with 8-bit activations in AVX2; int8.h says what they compute. Rows of w are taken apart
 * into bytes and f32 scales, a few at a time, and meet all tokens then. */
#include "kern/int8.h"

#include <string.h>

#include "kern/int8_quantize.h"
#include "kern/v16_avx2.h"
#include "kern/vector_codes.h"

/* Rows that are taken apart at once: as many as fit into the scratch of a panel. */
enum { ROWS = 8 };

/* A row of w, padded to four blocks with zeros. Codes of 8 bits stay where they are if they can. */
typedef struct weight_row {
    const uint8_t *codes;
    float *scales, *second; /* of blocks; biases, or scales of second halves */
} weight_row;

/* ---- codes ---------------------------------------------------------------------------------- */

/* 32 nibbles in order, E2M1 doubled and moved. */
V16_FN __m256i nibbles(int is_e2m1, const uint8_t *p)
{
    __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    __m128i raw = _mm_loadu_si128((const void *)p), mask = _mm_set1_epi8(15);
    __m128i lo = _mm_and_si128(raw, mask), hi = _mm_and_si128(_mm_srli_epi16(raw, 4), mask);
    __m256i c = _mm256_set_m128i(_mm_unpackhi_epi8(lo, hi), _mm_unpacklo_epi8(lo, hi));
    return is_e2m1 ? _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), c) : c;
}

/* 16 codes in the order of their 16-bit numbers: 0-3, 8-11, 4-7, 12-15. */
V16_FN __m256i sixteen(int bits, const uint8_t *p)
{
    v16i s = v16_spread(load_codes(p, bits), bits);
    __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
    return _mm256_packs_epi32(_mm256_and_si256(s.lo, mask), _mm256_and_si256(s.hi, mask));
}

V16_FN void spread_row(int bits, const uint8_t *p, int64_t n, uint8_t *out)
{
    __m256i order = SETR(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t b = 0; b < n; b++, p += 4 * bits, out += INT8_BLOCK) {
        __m256i c = _mm256_packus_epi16(sixteen(bits, p), sixteen(bits, p + 2 * bits));
        _mm256_storeu_si256((void *)out, _mm256_permutevar8x32_epi32(c, order));
    }
}

static void write_codes(const num_matrix *w, int64_t row, int64_t n, uint8_t *out)
{
    const uint8_t *p = w->codes + row * w->row_bytes;
    switch (w->bits) {
    case 2: spread_row(2, p, n, out); break;
    case 3: spread_row(3, p, n, out); break;
    case 4:
        for (int64_t b = 0; b < n; b++)
            _mm256_storeu_si256((void *)(out + b * INT8_BLOCK),
                                nibbles(w->mode != NUM_AFFINE, p + 16 * b));
        break;
    case 5: spread_row(5, p, n, out); break;
    case 6: spread_row(6, p, n, out); break;
    default: int8_codes(w, row, out); break;
    }
}

/* ---- scales --------------------------------------------------------------------------------- */

/* n <= 16 numbers from i on; U8 means E8M0 or, under nvfp4, E4M3. */
V16_FN v16 load_numbers(num_mode mode, const uint8_t *p, num_dtype dtype, int64_t i, int64_t n,
                        float gain)
{
    uint8_t copy[64];
    int size = num_dtype_bytes(dtype);
    p += i * size;
    if (n < 16) {
        v16_copy_bytes(copy, p, n * size);
        p = copy;
    }
    v16 x;
    if (mode == NUM_NVFP4)
        x = v16_from_e4m3(_mm_loadu_si128((const void *)p));
    else if (mode == NUM_MXFP4)
        x = v16_from_e8m0(_mm_loadu_si128((const void *)p));
    else if (dtype == NUM_DT_F32)
        return v16_load((const float *)(const void *)p);
    else
        return dtype == NUM_DT_F16 ? v16_from_f16(_mm256_loadu_si256((const void *)p))
                                   : v16_from_bf16(_mm256_loadu_si256((const void *)p));
    return v16_mul(x, v16_set1(gain));
}

/* The even and the odd ones of 16 numbers. */
V16_FN void store_apart(v16 x, float *even, float *odd)
{
    __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(x.lo, x.hi, 0x88));
    __m256d o = _mm256_castps_pd(_mm256_shuffle_ps(x.lo, x.hi, 0xdd));
    _mm256_storeu_ps(even, _mm256_castpd_ps(_mm256_permute4x64_pd(e, 0xd8)));
    _mm256_storeu_ps(odd, _mm256_castpd_ps(_mm256_permute4x64_pd(o, 0xd8)));
}

V16_FN void store_twice(v16 x, float *out)
{
    __m256i lo = SETR(0, 0, 1, 1, 2, 2, 3, 3), hi = SETR(4, 4, 5, 5, 6, 6, 7, 7);
    _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(x.lo, lo));
    _mm256_storeu_ps(out + 8, _mm256_permutevar8x32_ps(x.lo, hi));
    _mm256_storeu_ps(out + 16, _mm256_permutevar8x32_ps(x.hi, lo));
    _mm256_storeu_ps(out + 24, _mm256_permutevar8x32_ps(x.hi, hi));
}

/* Numbers g .. g + n of a row to where their blocks are: `out` gets the first or only one of a
 * block, `odd` under nvfp4 the second. */
V16_FN void place_numbers(num_mode mode, v16 x, int64_t g, int64_t n, int64_t per_number,
                          float *out, float *odd)
{
    float each[16];
    if (n == 16 && mode == NUM_NVFP4) {
        store_apart(x, out + g / 2, odd + g / 2);
        return;
    }
    if (n == 16 && per_number == 1) {
        v16_store(out + g, x);
        return;
    }
    if (n == 16 && per_number == 2) {
        store_twice(x, out + 2 * g);
        return;
    }
    v16_store(each, x);
    for (int64_t i = 0; i < n; i++) {
        if (mode == NUM_NVFP4) ((g + i) % 2 ? odd : out)[(g + i) / 2] = each[i];
        for (int64_t b = 0; b < per_number; b++) out[(g + i) * per_number + b] = each[i];
    }
}

V16_FN void write_numbers(num_mode mode, const num_matrix *w, const uint8_t *p, num_dtype dtype,
                          int64_t row, float *out, float *odd)
{
    int64_t n = int8_n_groups(w), per_number = w->group / INT8_BLOCK;
    for (int64_t g = 0; g < n; g += 16) {
        int64_t count = n - g < 16 ? n - g : 16;
        v16 x = load_numbers(mode, p, dtype, row * n + g, count, int8_gain(w));
        place_numbers(mode, x, g, count, per_number, out, odd);
    }
}

static void write_scales(const num_matrix *w, int64_t row, float *scales, float *second)
{
    switch (w->mode) {
    case NUM_MXFP4: write_numbers(NUM_MXFP4, w, w->scales, NUM_DT_U8, row, scales, NULL); break;
    case NUM_NVFP4: write_numbers(NUM_NVFP4, w, w->scales, NUM_DT_U8, row, scales, second); break;
    default:
        write_numbers(NUM_AFFINE, w, w->scales, w->scale_dtype, row, scales, NULL);
        write_numbers(NUM_AFFINE, w, w->biases, w->bias_dtype, row, second, NULL);
        break;
    }
}

/* Row `row` of w, in piece r of scratch. */
static weight_row take_apart(const num_matrix *w, int64_t row, void *scratch, int r)
{
    int64_t n = w->cols / INT8_BLOCK, n_blocks = int8_n_blocks(w->cols);
    uint8_t *codes = (uint8_t *)scratch + r * n_blocks * (INT8_BLOCK + 8);
    float *scales = (float *)(void *)(codes + n_blocks * INT8_BLOCK), *second = scales + n_blocks;
    kern_prefetch_all(w->codes, row * w->row_bytes + KERN_PREFETCH, w->row_bytes);
    memset(scales, 0, (size_t)n_blocks * 2 * sizeof *scales);
    write_scales(w, row, scales, second);
    if (w->bits == 8 && n == n_blocks)
        return (weight_row){w->codes + row * w->row_bytes, scales, second};
    write_codes(w, row, n, codes);
    memset(codes + n * INT8_BLOCK, 0, (size_t)((n_blocks - n) * INT8_BLOCK));
    return (weight_row){codes, scales, second};
}

/* ---- products ------------------------------------------------------------------------------- */

/* Eight sums of products of 32 codes. Those of 8 bits may be 255, too much for two products in 16
 * bits: 128 is taken off them. */
V16_FN __m256i dot_32(int wide, const uint8_t *codes, const int8_t *q)
{
    __m256i c = _mm256_loadu_si256((const void *)codes), x = _mm256_loadu_si256((const void *)q);
    __m256i ones = _mm256_set1_epi16(1);
    if (!wide) return _mm256_madd_epi16(_mm256_maddubs_epi16(c, x), ones);
    c = _mm256_xor_si256(c, _mm256_set1_epi8(INT8_MIN));
    __m256i d = _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(x, c));
    return _mm256_madd_epi16(d, ones);
}

/* 128 * sum of q from -12 * sum of q: times -32 / 3, of which the 1 / 3 is exact modulo 2^32. */
V16_FN __m128i taken_off(const int32_t *offset)
{
    __m128i factor = _mm_set1_epi32((int)(0u - 32u * 0xaaaaaaabu));
    return _mm_mullo_epi32(_mm_loadu_si128((const void *)offset), factor);
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
    if (wide) all = _mm_add_epi32(all, taken_off(x.offset + b));
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
        weight_row rows[ROWS];
        for (int i = 0; i < n; i++) rows[i] = take_apart(w, row + r + i, scratch, i);
        for (int64_t t = 0; t < n_x; t++) {
            int8_row q = int8_row_at((char *)(uintptr_t)x + t * stride, w->cols);
            for (int i = 0; i < n; i++) y[t * ldy + r + i] = any_product(w, rows[i], q, n_blocks);
        }
    }
}

const kern_int8_ops kern_avx2_int8 = {.quantize = int8_quantize, .product = product};
