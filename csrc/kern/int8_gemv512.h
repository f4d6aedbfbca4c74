/* Products of a few quantized rows with matrices straight from their layout in the file: four rows
 * of w at a time, four blocks of columns in the 128-bit lanes of a register. Included by
 * int8_vnni512.h. */
#ifndef KERN_INT8_GEMV512_H
#define KERN_INT8_GEMV512_H

#include "kern/int8_pairs512.h"

/* Rows of w side by side. Most tokens at once, of nibbles and of other codes: above, laying a panel
 * out pays. */
enum { QUAD = 4, GEMV_TOKENS = 6, GEMV_WIDE_TOKENS = 4, STRIP_BLOCKS = 16 };

#define EACH_ROW   _Pragma("GCC unroll 4") for (int r = 0; r < QUAD; r++)
#define EACH_TOKEN _Pragma("GCC unroll 6") for (int t = 0; t < n_tokens; t++)

typedef struct gemv {
    const num_matrix *w;
    number_source scales, biases;
    unpacker unpack;
    int shift; /* log2 of the blocks of a group, -1 if there is none */
    int64_t blocks_per_group;
    int64_t rows_ahead; /* from those that are read to those whose numbers are asked for */
    int has_words;
} gemv;

/* What is read of four rows, each of them so many bytes behind the one before: none where fewer
 * than four are asked for and one row stands for all. */
typedef struct quad {
    const uint8_t *codes;
    int64_t row_bytes;
    number_source scales, biases;
    kern_ahead ahead;
    int64_t in_row; /* bytes to what is asked for of codes of three bits, in each row on its own */
} quad;

/* A row of x; of pairs of rows also in quarters. */
typedef struct gemv_x {
    int8_row row;
    const int8_t *quarters;
} gemv_x;

/* Two numbers per row and block of a strip of 16 blocks: member i is [block 4 i + lane][row], or
 * what int8_pairs512.h says of these blocks. */
typedef struct factors {
    v16 first[4], second[4];
} factors;

/* ---- scales of a strip ---------------------------------------------------------------------- */

/* From rows whose element 4 j + i is of block 4 i + j. */
V16_FN void interleave_rows(const v16 rows[QUAD], v16 out[4])
{
    v16 lo = v16_unpack_lo(rows[0], rows[1]), hi = v16_unpack_hi(rows[0], rows[1]);
    v16 lo2 = v16_unpack_lo(rows[2], rows[3]), hi2 = v16_unpack_hi(rows[2], rows[3]);
    out[0] = v16_join_lo(lo, lo2);
    out[1] = v16_join_hi(lo, lo2);
    out[2] = v16_join_lo(hi, hi2);
    out[3] = v16_join_hi(hi, hi2);
}

/* Which number of a strip that begins at block b element 4 j + i is. */
V16_FN __m512i group_index(const gemv *v, int64_t b)
{
    __m512i block = SETR(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    if (v->shift >= 0) return _mm512_srl_epi32(block, _mm_cvtsi32_si128(v->shift));
    int32_t index[16];
    int64_t n = v->blocks_per_group, first = b / n;
    for (int i = 0; i < 16; i++) index[i % 4 * 4 + i / 4] = (int32_t)((b + i) / n - first);
    return _mm512_loadu_si512(index);
}

/* Where a register with eight words of each of four rows has the one of a group of two blocks that
 * belongs to element i of [block][row] or of pairs, as the upper half of an index of 32 bits. */
#define WORD_AT(i, unused)      ((8 * ((i) % 4) + (i) / 8) << 16)
#define PAIR_WORD_AT(i, unused) ((8 * PAIR_ROW(i) + PAIR_BLOCK(i, unused) / 2) << 16)

/* Numbers of 16 bits for groups of two blocks: what most converters write. */
V16_FN int has_words(const num_matrix *w)
{
    return w->mode == NUM_AFFINE && w->group == 2 * INT8_BLOCK && w->scale_dtype != NUM_DT_F32 &&
           w->bias_dtype != NUM_DT_F32;
}

/* Those of a whole strip from group g on, eight of a row: of a register that holds them all, one
 * permutation brings a member of factors to the upper halves of its elements. */
V16_FN void load_words(int paired, const number_source *s, int64_t g, v16 out[4])
{
    __m128i words[QUAD];
    EACH_ROW words[r] = _mm_loadu_si128((const void *)(s->data + r * s->row_bytes + 2 * g));
    __m512i all = _mm512_castsi128_si512(words[0]);
    all = _mm512_inserti32x4(all, words[1], 1);
    all = _mm512_inserti32x4(all, words[2], 2);
    all = _mm512_inserti32x4(all, words[3], 3);
    __m512i first = paired ? SETR(EACH_LO(PAIR_WORD_AT, 0), EACH_HI(PAIR_WORD_AT, 0))
                           : SETR(EACH_LO(WORD_AT, 0), EACH_HI(WORD_AT, 0));
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
    {
        __m512i at = _mm512_add_epi32(first, _mm512_set1_epi32(2 * i << 16));
        __m512i upper = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, at, all);
        out[i] = s->dtype == NUM_DT_BF16
                     ? _mm512_castsi512_ps(upper)
                     : v16_from_f16(_mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)));
    }
}

V16_FN void load_factors(num_mode mode, const gemv *v, const quad *q, int64_t b, int64_t n,
                         factors *f)
{
    v16 one[QUAD], two[QUAD];
    if (mode == NUM_NVFP4) {
        __m512i even = SETR(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30);
        __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        EACH_ROW
        {
            v16 lo = load_numbers(mode, &q->scales, r, 2 * b, least(2 * n, 16)), hi = lo;
            if (n > 8) hi = load_numbers(mode, &q->scales, r, 2 * b + 16, 2 * n - 16);
            one[r] = _mm512_permutex2var_ps(lo, even, hi);
            two[r] = _mm512_permutex2var_ps(lo, odd, hi);
        }
    } else {
        int64_t g = b / v->blocks_per_group, count = (b + n - 1) / v->blocks_per_group - g + 1;
        __m512i index = group_index(v, b);
        EACH_ROW
        {
            one[r] = _mm512_permutexvar_ps(index, load_numbers(mode, &q->scales, r, g, count));
            if (mode == NUM_AFFINE)
                two[r] = _mm512_permutexvar_ps(index, load_numbers(mode, &q->biases, r, g, count));
        }
    }
    interleave_rows(one, f->first);
    if (mode != NUM_MXFP4) interleave_rows(two, f->second);
}

/* The scales of 16 blocks of four mxfp4 rows by moving bytes: an exponent, less one for the gain,
 * in the place where f32 has it. 0 when a scale is none of that kind: hardly ever. */
V16_FN int exponent_factors(const quad *q, int64_t b, factors *f)
{
    __m512i one = _mm512_set1_epi8(1), bytes = _mm512_setzero_si512();
    __m128i every_fourth = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i crosswise = SETR(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const uint8_t *p[QUAD];
    EACH_ROW p[r] = q->scales.data + r * q->scales.row_bytes + b;
    bytes = _mm512_inserti32x4(bytes, _mm_loadu_si128((const void *)p[0]), 0);
    bytes = _mm512_inserti32x4(bytes, _mm_loadu_si128((const void *)p[1]), 1);
    bytes = _mm512_inserti32x4(bytes, _mm_loadu_si128((const void *)p[2]), 2);
    bytes = _mm512_inserti32x4(bytes, _mm_loadu_si128((const void *)p[3]), 3);
    bytes = _mm512_sub_epi8(bytes, one);
    /* 255 is a NaN, 0 and 1 would be subnormal */
    if (_mm512_cmpge_epu8_mask(_mm512_sub_epi8(bytes, one), _mm512_set1_epi8((char)253))) return 0;
    /* byte i of number [lane][row] is of block 4 i + lane */
    bytes = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(every_fourth));
    bytes = _mm512_permutexvar_epi32(crosswise, bytes);
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
    {
        __m512i e = i < 3 ? _mm512_slli_epi32(bytes, 23 - 8 * i) : _mm512_srli_epi32(bytes, 1);
        f->first[i] = _mm512_castsi512_ps(_mm512_and_si512(e, _mm512_set1_epi32(0x7f800000)));
    }
    return 1;
}

/* In the order that the mode and the width of code want. */
V16_FN void strip_factors(num_mode mode, int bits, const gemv *v, const quad *q, int64_t b,
                          int64_t n, factors *f)
{
    int paired = is_paired(mode, bits), whole = n == STRIP_BLOCKS;
    if (mode == NUM_AFFINE && whole && v->has_words) {
        load_words(paired, &q->scales, b / 2, f->first);
        load_words(paired, &q->biases, b / 2, f->second);
        return;
    }
    if (mode == NUM_MXFP4 && whole && exponent_factors(q, b, f)) return;
    load_factors(mode, v, q, b, n, f);
    if (!paired) return;
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
    {
        f->first[i] = to_pairs(f->first[i]);
        f->second[i] = to_pairs(f->second[i]);
    }
}

/* ---- four blocks of four rows --------------------------------------------------------------- */

/* Sums of neighbours in a's lanes and, behind them, in b's; what is added fits in 16 bits. */
V16_FN __m512i sum_neighbours(__m512i a, __m512i b)
{
    return _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1));
}

/* [lane][row] sums of the four numbers of each lane. */
V16_FN __m512i sum_quads(const __m512i s[QUAD])
{
    __m512i a =
        _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
    __m512i c =
        _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
}

/* The same where sums fit in 16 bits: 16 products of affine codes of up to four bits do. */
V16_FN __m512i sum_words(const __m512i s[QUAD])
{
    return sum_neighbours(sum_neighbours(s[0], s[1]), sum_neighbours(s[2], s[3]));
}

/* [lane][row] sums of the first two and of the last two numbers of each lane, and of what is in the
 * even and in the odd places of `start`. Eight products of codes up to 24 fit in 16 bits. */
V16_FN void sum_pairs(const __m512i s[QUAD], __m512i start, __m512i out[2])
{
    __m512i one = _mm512_set1_epi16(1);
    __m512i a = _mm512_dpwssd_epi32(start, _mm512_packs_epi32(s[0], s[1]), one);
    __m512i c = _mm512_dpwssd_epi32(start, _mm512_packs_epi32(s[2], s[3]), one);
    v16 lo = _mm512_castsi512_ps(a), hi = _mm512_castsi512_ps(c);
    out[0] = _mm512_castps_si512(_mm512_shuffle_ps(lo, hi, 0x88));
    out[1] = _mm512_castps_si512(_mm512_shuffle_ps(lo, hi, 0xdd));
}

/* p[4] to where their blocks are: each lane four times its element, or in pairs. */
V16_FN v16 spread_floats(int paired, const float *p)
{
    __m512i index = paired ? SETR(EACH_LO(PAIR_BLOCK, 0), EACH_HI(PAIR_BLOCK, 0))
                           : SETR(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

/* Each lane twice elements 2 * lane and 2 * lane + 1 of p[8]. */
V16_FN __m512i spread_pairs(const int32_t *p)
{
    __m512i index = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm512_permutexvar_epi64(index,
                                    _mm512_castsi256_si512(_mm256_loadu_si256((const void *)p)));
}

V16_FN v16 add_term(v16 sum, __m512i d, v16 scale, v16 x_scale)
{
    return v16_fma(_mm512_cvtepi32_ps(d), v16_mul(scale, x_scale), sum);
}

/* Codes of blocks b .. b + 4 of a row, of which n columns are there. */
V16_FN void load_row_codes(num_mode mode, int bits, const unpacker *u, const uint8_t *p, int64_t n,
                           __m512i out[2])
{
    if (is_split(mode, bits)) {
        codes_apart(mode, bits, u, p, least(n, 128), out);
        return;
    }
    out[0] = codes_in_order(bits, u, p, least(n, 64));
    out[1] = codes_in_order(bits, u, p + 8 * bits, n > 64 ? n - 64 : 0);
}

/* Four sums per block: a lane of the result is a block. */
V16_FN __m512i row_dot(int split, const __m512i code[2], __m512i x0, __m512i x1)
{
    __m512i zero = _mm512_setzero_si512(), a = _mm512_dpbusd_epi32(zero, code[0], x0);
    if (split) return _mm512_dpbusd_epi32(a, code[1], x1);
    __m512i b = _mm512_dpbusd_epi32(zero, code[1], x1);
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

/* Sums of code * q over blocks b .. b + 4, as they are in factors; of nvfp4 over both halves. */
V16_FN void quad_dots(num_mode mode, int bits, const __m512i code[2 * QUAD], const gemv_x *x,
                      int64_t b, __m512i d[2])
{
    __m512i s[QUAD];
    if (is_paired(mode, bits)) {
        pair_dots(code, x->quarters + b * INT8_BLOCK, s);
        d[0] = sum_neighbours(s[0], s[1]);
        return;
    }
    int split = is_split(mode, bits);
    const int8_t *q = (split ? x->row.split : x->row.natural) + b * INT8_BLOCK;
    __m512i x0 = _mm512_loadu_si512(q), x1 = _mm512_loadu_si512(q + 64);
    EACH_ROW s[r] = row_dot(split, code + 2 * r, x0, x1);
    if (!split) {
        d[0] = sum_quads(s);
    } else if (mode == NUM_AFFINE) {
        d[0] = sum_words(s);
    } else { /* codes are moved by INT8_E2M1_OFFSET */
        sum_pairs(s, spread_pairs(x->row.half + 2 * b), d);
        if (mode == NUM_MXFP4) d[0] = _mm512_add_epi32(d[0], d[1]);
    }
}

V16_FN v16 add_blocks(num_mode mode, int bits, const __m512i code[2 * QUAD], v16 first, v16 second,
                      const gemv_x *x, int64_t b, v16 sum)
{
    __m512i d[2];
    int paired = is_paired(mode, bits);
    v16 scale = spread_floats(paired, x->row.scale + b);
    quad_dots(mode, bits, code, x, b, d);
    sum = add_term(sum, d[0], first, scale);
    if (mode == NUM_NVFP4) return add_term(sum, d[1], second, scale);
    if (mode != NUM_AFFINE) return sum;
    return v16_fma(second, spread_floats(paired, x->row.sum + b), sum);
}

/* `n` <= 16 blocks from `strip` on: a constant for all but a ragged end, so that no mask has to be
 * worked out. */
V16_FN void gemv_strip(num_mode mode, int bits, int n_tokens, const gemv *v, const quad *q,
                       int64_t strip, int64_t n, const gemv_x *x, v16 *sum)
{
    factors f;
    strip_factors(mode, bits, v, q, strip, n, &f);
    _Pragma("GCC unroll 4") for (int64_t i = 0; INT8_PARTS * i < n; i++)
    {
        int64_t b = strip + INT8_PARTS * i, at = b * INT8_BLOCK * bits / 8;
        int64_t cols = (n - INT8_PARTS * i) * INT8_BLOCK;
        __m512i code[2 * QUAD];
        const uint8_t *p[QUAD];
        EACH_ROW
        {
            p[r] = q->codes + r * q->row_bytes + at;
            if (bits == 3)
                kern_prefetch(kern_address(p[r], q->in_row));
            else
                for (int k = r * bits / QUAD; k < (r + 1) * bits / QUAD; k++)
                    kern_ask(&q->ahead, bits < 8 ? 2 : KERN_ASKS, QUAD * at + 64 * k);
            if (!is_paired(mode, bits))
                load_row_codes(mode, bits, &v->unpack, p[r], cols, code + 2 * r);
        }
        if (is_paired(mode, bits)) {
            load_pair(p[0], p[1], least(cols, 128), code);
            load_pair(p[2], p[3], least(cols, 128), code + 4);
        }
        v16 second = mode == NUM_MXFP4 ? v16_zero() : f.second[i];
        EACH_TOKEN sum[t] = add_blocks(mode, bits, code, f.first[i], second, &x[t], b, sum[t]);
    }
}

V16_FN void ask_ahead(const gemv *v, const number_source *s)
{
    kern_prefetch_all(s->data, v->rows_ahead * s->row_bytes, QUAD * s->row_bytes);
}

/* Four rows from `row` on; n_together is 4, or 1 where one stands for all. */
V16_FN quad quad_at(num_mode mode, const gemv *v, int64_t row, int64_t n_together)
{
    const num_matrix *w = v->w;
    int64_t many = n_together > 1;
    quad q = {.codes = w->codes + row * w->row_bytes,
              .row_bytes = many * w->row_bytes,
              .scales = v->scales,
              .biases = v->biases,
              .ahead = kern_look_ahead(w, row, QUAD)};
    q.scales.data += row * q.scales.row_bytes;
    if (mode == NUM_AFFINE) q.biases.data += row * q.biases.row_bytes;
    if (row + v->rows_ahead + QUAD <= w->rows) {
        q.in_row = v->rows_ahead * w->row_bytes;
        ask_ahead(v, &q.scales);
        if (mode == NUM_AFFINE) ask_ahead(v, &q.biases);
    }
    q.scales.row_bytes *= many;
    q.biases.row_bytes *= many;
    return q;
}

/* Four rows against n_tokens rows of x. The lanes of a sum are the parts of int8.h. */
V16_FN void gemv_quad(num_mode mode, int bits, int n_tokens, const gemv *v, const quad *q,
                      const gemv_x *x, v16 *sum)
{
    int64_t n_blocks = v->w->cols / INT8_BLOCK, strip = 0;
    EACH_TOKEN sum[t] = v16_zero();
    for (; strip + STRIP_BLOCKS <= n_blocks; strip += STRIP_BLOCKS)
        gemv_strip(mode, bits, n_tokens, v, q, strip, STRIP_BLOCKS, x, sum);
    if (strip < n_blocks) gemv_strip(mode, bits, n_tokens, v, q, strip, n_blocks - strip, x, sum);
}

/* Rows in fours, the last of which may be some of those before, computed again; fewer than four on
 * their own. */
V16_FN void gemv_tokens(num_mode mode, int bits, int n_tokens, const gemv *v, int64_t row,
                        int64_t n_rows, const gemv_x *x, float *y, int64_t ldy)
{
    int64_t n = n_rows < QUAD ? 1 : QUAD;
    for (int64_t done = 0; done < n_rows; done += n) {
        int64_t first = least(done, n_rows - n);
        quad q = quad_at(mode, v, row + first, n);
        v16 sum[GEMV_TOKENS];
        gemv_quad(mode, bits, n_tokens, v, &q, x, sum);
        EACH_TOKEN
        {
            if (is_paired(mode, bits)) sum[t] = from_pairs(sum[t]);
            __m256 h = v16_halves(sum[t]); /* 0 + 2, 1 + 3 */
            __m128 four = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
            four = _mm_add_ps(four, _mm_setzero_ps());
            _mm_mask_storeu_ps(y + t * ldy + first, (__mmask8)((1 << n) - 1), four);
        }
    }
}

/* y[t*ldy + r] for up to GEMV_TOKENS tokens, of wide codes GEMV_WIDE_TOKENS. scratch: a byte for
 * each column and token, for the quarters: made for each block of rows, of whose instructions they
 * are some 3 %, as a row of x does not know what it will meet. */
V16_FN void gemv_run(num_mode mode, int bits, const num_matrix *w, int64_t row, int64_t n_rows,
                     const char *x, int n_x, float *y, int64_t ldy, int8_t *scratch)
{
    int64_t per_group = w->group / INT8_BLOCK;
    gemv v = {.w = w,
              .scales = scales_of(mode, w),
              .unpack = make_unpacker(mode, bits),
              .shift = per_group & (per_group - 1) ? -1 : __builtin_ctzll((uint64_t)per_group | 64),
              .blocks_per_group = per_group,
              .rows_ahead = KERN_PREFETCH / w->row_bytes + QUAD,
              .has_words = has_words(w)};
    int64_t n_blocks = int8_n_blocks(w->cols);
    gemv_x rows[GEMV_TOKENS];
    if (mode == NUM_AFFINE) v.biases = biases_of(w);
    for (int t = 0; t < n_x; t++) {
        int8_t *quarters = scratch + t * n_blocks * INT8_BLOCK;
        const char *at = x + t * kern_int8_bytes(w->cols);
        rows[t] = (gemv_x){int8_row_at((char *)(uintptr_t)at, w->cols), quarters};
        if (is_paired(mode, bits)) make_quarters(rows[t].row, n_blocks, quarters);
    }
    switch (n_x) {
    case 1: gemv_tokens(mode, bits, 1, &v, row, n_rows, rows, y, ldy); break;
    case 2: gemv_tokens(mode, bits, 2, &v, row, n_rows, rows, y, ldy); break;
    case 3: gemv_tokens(mode, bits, 3, &v, row, n_rows, rows, y, ldy); break;
    case 4: gemv_tokens(mode, bits, 4, &v, row, n_rows, rows, y, ldy); break;
    default:
        if (!has_nibbles(mode, bits)) break; /* n_x is at most GEMV_WIDE_TOKENS */
        if (n_x == 5)
            gemv_tokens(mode, bits, 5, &v, row, n_rows, rows, y, ldy);
        else
            gemv_tokens(mode, bits, 6, &v, row, n_rows, rows, y, ldy);
    }
}

#endif
