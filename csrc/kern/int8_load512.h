/* How codes and scales of the int8 products get into AVX-512 registers. Included by
 * avx512_int8.c. Everything is written for a mode and a width of code that are constants after
 * inlining; masked loads touch no byte behind the last row of a mapped file. */
#ifndef KERN_INT8_LOAD512_H
#define KERN_INT8_LOAD512_H

#include "kern/int8.h"
#include "kern/v16_avx512.h"

V16_FN int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Whether codes come apart as even and odd columns: 16 of them lie in eight bytes. */
V16_FN int is_split(num_mode mode, int bits)
{
    return mode != NUM_AFFINE || bits <= 4;
}

V16_FN int has_nibbles(num_mode mode, int bits)
{
    return mode != NUM_AFFINE || bits == 4;
}

V16_FN __mmask64 first_bytes(int64_t n)
{
    return n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1;
}

/* ---- codes ---------------------------------------------------------------------------------- */

/* What takes codes apart: for nibbles the table of E2M1 four times over, as a byte permutation
 * looks at six bits of an index; for other widths which bytes each eight codes of the result lie in
 * and where each of them begins. */
typedef struct unpacker {
    __m512i table, shift, odd, mask;
} unpacker;

/* For affine codes of which the first of each eight bytes of the result lies `step` bits behind
 * that of the eight before. */
V16_FN unpacker affine_unpacker(int bits, int step)
{
    uint8_t bytes[64], shifts[64];
    unpacker u = {.mask = _mm512_set1_epi8((char)((1 << bits) - 1))};
    for (int i = 0; i < 64; i++) {
        bytes[i] = (uint8_t)(i / 8 * step + i % 8);
        shifts[i] = (uint8_t)(i % 8 * step);
    }
    u.table = _mm512_loadu_si512(bytes);
    u.shift = _mm512_loadu_si512(shifts);
    u.odd = _mm512_add_epi8(u.shift, _mm512_set1_epi8((char)bits));
    return u;
}

/* The doubled values of E2M1, moved. */
V16_FN __m512i e2m1_table(int offset)
{
    __m128i values = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    return _mm512_broadcast_i32x4(_mm_add_epi8(values, _mm_set1_epi8((char)offset)));
}

V16_FN unpacker make_unpacker(num_mode mode, int bits)
{
    if (mode == NUM_AFFINE) return affine_unpacker(bits, is_split(mode, bits) ? 2 * bits : bits);
    return (unpacker){.table = e2m1_table(INT8_E2M1_OFFSET)};
}

/* For codes in the order of columns, E2M1 with its sign. Nibbles come as 32 bits of eight columns:
 * `shift` takes the first four apart, `odd` the others. */
V16_FN unpacker ordered_unpacker(num_mode mode, int bits)
{
    if (!has_nibbles(mode, bits)) return affine_unpacker(bits, bits);
    unpacker u = {.table = e2m1_table(0), .mask = _mm512_set1_epi8(15)};
    u.shift = _mm512_set1_epi64(0x2c2824200c080400);
    u.odd = _mm512_set1_epi64(0x3c3834301c181410);
    return u;
}

V16_FN __m512i low_nibbles(num_mode mode, const unpacker *u, __m512i raw)
{
    return mode == NUM_AFFINE ? _mm512_and_si512(raw, u->mask)
                              : _mm512_permutexvar_epi8(raw, u->table);
}

V16_FN __m512i high_nibbles(num_mode mode, const unpacker *u, __m512i raw)
{
    return low_nibbles(mode, u, _mm512_srli_epi16(raw, 4));
}

/* The first and the last four of eight nibbles. */
V16_FN __m512i first_nibbles(num_mode mode, const unpacker *u, __m512i raw)
{
    return low_nibbles(mode, u, _mm512_multishift_epi64_epi8(u->shift, raw));
}

V16_FN __m512i last_nibbles(num_mode mode, const unpacker *u, __m512i raw)
{
    return low_nibbles(mode, u, _mm512_multishift_epi64_epi8(u->odd, raw));
}

/* Even and odd ones of n <= 128 codes of `bits` <= 4 at p. */
V16_FN void codes_apart(num_mode mode, int bits, const unpacker *u, const uint8_t *p, int64_t n,
                        __m512i out[2])
{
    __m512i raw = _mm512_maskz_loadu_epi8(first_bytes(n * bits / 8), p);
    if (has_nibbles(mode, bits)) {
        out[0] = low_nibbles(mode, u, raw);
        out[1] = high_nibbles(mode, u, raw);
        return;
    }
    raw = _mm512_permutexvar_epi8(u->table, raw);
    out[0] = _mm512_and_si512(_mm512_multishift_epi64_epi8(u->shift, raw), u->mask);
    out[1] = _mm512_and_si512(_mm512_multishift_epi64_epi8(u->odd, raw), u->mask);
}

/* n <= 64 codes of `bits` at p in order, zeros behind them. */
V16_FN __m512i codes_in_order(int bits, const unpacker *u, const uint8_t *p, int64_t n)
{
    __m512i raw = _mm512_maskz_loadu_epi8(first_bytes(n * bits / 8), p);
    if (bits == 8) return raw;
    raw = _mm512_multishift_epi64_epi8(u->shift, _mm512_permutexvar_epi8(u->table, raw));
    return _mm512_and_si512(raw, u->mask);
}

/* ---- scales and biases ---------------------------------------------------------------------- */

/* The numbers of a row's groups: scales, with what the codes are short of, or biases. */
typedef struct number_source {
    num_dtype dtype; /* U8 means E8M0, or E4M3 under nvfp4 */
    float gain;
    const uint8_t *data;
    int64_t row_bytes;
} number_source;

V16_FN number_source scales_of(num_mode mode, const num_matrix *w)
{
    num_dtype dtype = mode == NUM_AFFINE ? w->scale_dtype : NUM_DT_U8;
    return (number_source){dtype, int8_gain(w), w->scales,
                           int8_n_groups(w) * num_dtype_bytes(dtype)};
}

V16_FN number_source biases_of(const num_matrix *w)
{
    return (number_source){w->bias_dtype, 1.0f, w->biases,
                           int8_n_groups(w) * num_dtype_bytes(w->bias_dtype)};
}

/* Numbers g .. g + n of a row, 1 <= n <= 16, zeros behind them. */
V16_FN v16 load_numbers(num_mode mode, const number_source *s, int64_t row, int64_t g, int64_t n)
{
    __mmask16 m = v16_mask(n);
    const uint8_t *p = s->data + row * s->row_bytes;
    if (mode == NUM_MXFP4)
        return _mm512_maskz_mul_ps(m, v16_from_e8m0(_mm_maskz_loadu_epi8(m, p + g)),
                                   v16_set1(s->gain));
    if (mode == NUM_NVFP4)
        return v16_mul(v16_from_e4m3(_mm_maskz_loadu_epi8(m, p + g)), v16_set1(s->gain));
    if (s->dtype == NUM_DT_F32) return _mm512_maskz_loadu_ps(m, p + 4 * g);
    __m256i h = _mm256_maskz_loadu_epi16(m, p + 2 * g);
    return s->dtype == NUM_DT_F16 ? v16_from_f16(h) : v16_from_bf16(h);
}

#endif
