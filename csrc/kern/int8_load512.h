/* How codes and scales of the int8 products get into AVX-512 registers, with VBMI or without.
 * Included by int8_gemv512.h and int8_panel512.h. Everything is written for a mode and a width of
 * code that are constants after inlining; masked loads touch no byte behind the last row of a
 * mapped file. */
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

/* Codes of other widths than 4 and 8 bits are taken apart in two steps: the bytes of SPREAD codes
 * are brought to as many bytes of the result, then each code to its byte. */

#ifdef __AVX512VBMI__

enum { SPREAD = 8 };

/* The bit at which each code begins in its eight bytes. */
typedef struct places {
    __m512i bits;
} places;

V16_FN __m512i spread_bytes(__m512i index, __m512i raw)
{
    return _mm512_permutexvar_epi8(index, raw);
}
V16_FN __m512i spread_index(int step)
{
    uint8_t index[64];
    for (int i = 0; i < 64; i++) index[i] = (uint8_t)(i / 8 * step + i % 8);
    return _mm512_loadu_si512(index);
}

V16_FN places places_at(const uint8_t bit[16])
{
    return (places){_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)bit))};
}
/* Bits that follow a code come with it. */
V16_FN __m512i take(const places *p, __m512i spread)
{
    return _mm512_multishift_epi64_epi8(p->bits, spread);
}

/* Of a table of 16 that is there four times over, as an index has six bits. */
V16_FN __m512i look_up(__m512i table, __m512i nibbles)
{
    return _mm512_permutexvar_epi8(nibbles, table);
}

#else

enum { SPREAD = 16 };

/* Two bytes for each even code and each odd one, and how far the one moves down, the other up. */
typedef struct places {
    __m512i even, odd, down, up;
} places;

V16_FN __m512i spread_bytes(__m512i index, __m512i raw)
{
    return _mm512_permutexvar_epi16(index, raw);
}
V16_FN __m512i spread_index(int step)
{
    uint16_t index[32];
    for (int i = 0; i < 32; i++) index[i] = (uint16_t)(i / 8 * step + i % 8);
    return _mm512_loadu_si512(index);
}

V16_FN places places_at(const uint8_t bit[16])
{
    uint8_t even[16], odd[16];
    uint16_t down[8], up[8];
    for (int i = 0; i < 16; i++) {
        even[i] = (uint8_t)(bit[i & ~1] / 8 + i % 2);
        odd[i] = (uint8_t)(bit[i | 1] / 8 + i % 2);
    }
    for (int i = 0; i < 8; i++) {
        down[i] = bit[2 * i] % 8;
        up[i] = (uint16_t)(8 - bit[2 * i + 1] % 8);
    }
    return (places){_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)even)),
                    _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)odd)),
                    _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)down)),
                    _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)up))};
}
V16_FN __m512i take(const places *p, __m512i spread)
{
    __m512i even = _mm512_srlv_epi16(_mm512_shuffle_epi8(spread, p->even), p->down);
    __m512i odd = _mm512_sllv_epi16(_mm512_shuffle_epi8(spread, p->odd), p->up);
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, odd);
}

V16_FN __m512i look_up(__m512i table, __m512i nibbles)
{
    return _mm512_shuffle_epi8(table, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
}

#endif

/* What takes codes apart: `table` is that of E2M1, or an index of spread_bytes; `second` are the
 * places of the odd columns, or of the last four of eight nibbles in order. */
typedef struct unpacker {
    __m512i table, mask;
    places first, second;
} unpacker;

/* For affine codes that lie `step` bits apart, and those `bits` further. */
V16_FN unpacker affine_unpacker(int bits, int step)
{
    uint8_t first[16], second[16];
    for (int i = 0; i < 16; i++) {
        first[i] = (uint8_t)(i / SPREAD * 8 * SPREAD + i % SPREAD * step);
        second[i] = (uint8_t)(first[i] + bits);
    }
    return (unpacker){spread_index(step), _mm512_set1_epi8((char)((1 << bits) - 1)),
                      places_at(first), places_at(second)};
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

/* For codes in the order of columns, E2M1 with its sign; nibbles as eight columns of each row. */
V16_FN unpacker ordered_unpacker(num_mode mode, int bits)
{
    if (!has_nibbles(mode, bits)) return affine_unpacker(bits, bits);
    uint8_t first[16], second[16];
    for (int i = 0; i < 16; i++) {
        first[i] = (uint8_t)(i / 4 * 32 + i % 4 * 4);
        second[i] = (uint8_t)(first[i] + 16);
    }
    return (unpacker){e2m1_table(0), _mm512_set1_epi8(15), places_at(first), places_at(second)};
}

V16_FN __m512i low_nibbles(num_mode mode, const unpacker *u, __m512i raw)
{
    return mode == NUM_AFFINE ? _mm512_and_si512(raw, u->mask) : look_up(u->table, raw);
}

V16_FN __m512i high_nibbles(num_mode mode, const unpacker *u, __m512i raw)
{
    return low_nibbles(mode, u, _mm512_srli_epi16(raw, 4));
}

/* The first and the last four of eight nibbles. */
V16_FN __m512i first_nibbles(num_mode mode, const unpacker *u, __m512i raw)
{
    return low_nibbles(mode, u, take(&u->first, raw));
}

V16_FN __m512i last_nibbles(num_mode mode, const unpacker *u, __m512i raw)
{
    return low_nibbles(mode, u, take(&u->second, raw));
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
    raw = spread_bytes(u->table, raw);
    out[0] = _mm512_and_si512(take(&u->first, raw), u->mask);
    out[1] = _mm512_and_si512(take(&u->second, raw), u->mask);
}

/* n <= 64 codes of `bits` at p in order, zeros behind them. */
V16_FN __m512i codes_in_order(int bits, const unpacker *u, const uint8_t *p, int64_t n)
{
    __m512i raw = _mm512_maskz_loadu_epi8(first_bytes(n * bits / 8), p);
    if (bits == 8) return raw;
    return _mm512_and_si512(take(&u->first, spread_bytes(u->table, raw)), u->mask);
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
