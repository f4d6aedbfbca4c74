/* v16 as two AVX registers; see v16_avx512.h for what each name means. */
#ifndef KERN_V16_H
#define KERN_V16_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kern/int_attn.h"
#include "kern/kern_const.h"

#define V16_FIT kern_avx2_fit
#define V16_ROW kern_avx2_row
#define V16_FN  static inline __attribute__((always_inline))

/* 16 registers: 2 x 3 sums are 12 of them. */
enum { V16_DOT_ROWS = 2, V16_DOT_TOKENS = 3, V16_FUSED_ROWS = 2 };
enum { V16_MIX_ROWS = 4, V16_MIX_COLS = 1 };
enum { V16_KEY_DIMS = 2, V16_KEY_OFFSET = 0 };

typedef struct v16 {
    __m256 lo, hi;
} v16;

typedef struct v16i {
    __m256i lo, hi;
} v16i;

V16_FN v16 v16_zero(void)
{
    return (v16){_mm256_setzero_ps(), _mm256_setzero_ps()};
}
V16_FN v16 v16_set1(float f)
{
    return (v16){_mm256_set1_ps(f), _mm256_set1_ps(f)};
}
V16_FN v16 v16_load(const float *p)
{
    return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
V16_FN void v16_store(float *p, v16 a)
{
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
V16_FN v16 v16_add(v16 a, v16 b)
{
    return (v16){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
V16_FN v16 v16_sub(v16 a, v16 b)
{
    return (v16){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
V16_FN v16 v16_mul(v16 a, v16 b)
{
    return (v16){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
V16_FN v16 v16_div(v16 a, v16 b)
{
    return (v16){_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
V16_FN v16 v16_fma(v16 a, v16 b, v16 c)
{
    return (v16){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

V16_FN v16i v16_mask(int64_t n)
{
    static const int32_t ones_zeros[32] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                           -1, -1, -1, -1, -1, -1, -1, -1};
    const int32_t *p = ones_zeros + 16 - n;
    return (v16i){_mm256_loadu_si256((const void *)p), _mm256_loadu_si256((const void *)(p + 8))};
}
V16_FN v16 v16_load_n(const float *p, int64_t n)
{
    v16i m = v16_mask(n);
    return (v16){_mm256_maskload_ps(p, m.lo), _mm256_maskload_ps(p + 8, m.hi)};
}
V16_FN void v16_store_n(float *p, v16 a, int64_t n)
{
    v16i m = v16_mask(n);
    _mm256_maskstore_ps(p, m.lo, a.lo);
    _mm256_maskstore_ps(p + 8, m.hi, a.hi);
}
V16_FN v16 v16_first(v16 a, int64_t n)
{
    v16i m = v16_mask(n);
    return (v16){_mm256_and_ps(a.lo, _mm256_castsi256_ps(m.lo)),
                 _mm256_and_ps(a.hi, _mm256_castsi256_ps(m.hi))};
}

V16_FN v16 v16_if_gt(v16 a, v16 b, v16 yes, v16 no)
{
    return (v16){_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
                 _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
V16_FN v16 v16_if_nan(v16 a, v16 yes, v16 no)
{
    return (v16){_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q)),
                 _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))};
}

V16_FN __m256 half_add_exponent(__m256 p, __m256 t)
{
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
V16_FN v16 v16_add_exponent(v16 p, v16 t)
{
    return (v16){half_add_exponent(p.lo, t.lo), half_add_exponent(p.hi, t.hi)};
}

V16_FN __m256 v16_halves(v16 a)
{
    return _mm256_add_ps(a.lo, a.hi);
}

V16_FN v16 v16_load_quarters(const float *p)
{
    return (v16){_mm256_set_m128(_mm_loadu_ps(p + 16), _mm_loadu_ps(p)),
                 _mm256_set_m128(_mm_loadu_ps(p + 48), _mm_loadu_ps(p + 32))};
}
V16_FN v16 v16_unpack_lo(v16 a, v16 b)
{
    return (v16){_mm256_unpacklo_ps(a.lo, b.lo), _mm256_unpacklo_ps(a.hi, b.hi)};
}
V16_FN v16 v16_unpack_hi(v16 a, v16 b)
{
    return (v16){_mm256_unpackhi_ps(a.lo, b.lo), _mm256_unpackhi_ps(a.hi, b.hi)};
}
V16_FN v16 v16_join_lo(v16 a, v16 b)
{
    return (v16){_mm256_shuffle_ps(a.lo, b.lo, 0x44), _mm256_shuffle_ps(a.hi, b.hi, 0x44)};
}
V16_FN v16 v16_join_hi(v16 a, v16 b)
{
    return (v16){_mm256_shuffle_ps(a.lo, b.lo, 0xee), _mm256_shuffle_ps(a.hi, b.hi, 0xee)};
}

/* Eight at a time: nearly always a whole number of them, and quicker than a call. */
V16_FN void v16_copy_bytes(uint8_t *to, const uint8_t *from, int64_t n)
{
    memset(to, 0, 64);
    for (; n >= 8; n -= 8, to += 8, from += 8) memcpy(to, from, 8);
    if (n > 0) memcpy(to, from, (size_t)n);
}

/* ---- integers in attention ------------------------------------------------------------------ */

V16_FN __m256 half_max_size(__m256 a, __m256 b)
{
    __m256i size = _mm256_and_si256(_mm256_castps_si256(b), _mm256_set1_epi32(INT32_MAX));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), size));
}
V16_FN v16 v16_max_size(v16 a, v16 b)
{
    return (v16){half_max_size(a.lo, b.lo), half_max_size(a.hi, b.hi)};
}
V16_FN uint32_t v16_top_bits(v16 a)
{
    __m256i h = _mm256_castps_si256(half_max_size(a.lo, a.hi));
    __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}

V16_FN v16i v16i_load(const void *p)
{
    return (v16i){_mm256_loadu_si256(p), _mm256_loadu_si256((const void *)((const char *)p + 32))};
}
V16_FN void v16i_store(void *p, v16i a)
{
    _mm256_storeu_si256(p, a.lo);
    _mm256_storeu_si256((void *)((char *)p + 32), a.hi);
}
V16_FN v16i v16i_set1(int32_t i)
{
    return (v16i){_mm256_set1_epi32(i), _mm256_set1_epi32(i)};
}
V16_FN v16 v16_from_i32(v16i a)
{
    return (v16){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}

V16_FN void v16_store_low(void *p, v16 a)
{
    __m256i mask = _mm256_set1_epi32(0xffff);
    __m256i both = _mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(a.lo), mask),
                                       _mm256_and_si256(_mm256_castps_si256(a.hi), mask));
    _mm256_storeu_si256(p, _mm256_permute4x64_epi64(both, 0xd8));
}
V16_FN __m256i half_join_pair(__m256 a, __m256 b)
{
    __m256i high = _mm256_slli_epi32(_mm256_castps_si256(b), 16);
    return _mm256_blend_epi16(high, _mm256_castps_si256(a), 0x55);
}
V16_FN v16i v16_join_pair(v16 a, v16 b)
{
    return (v16i){half_join_pair(a.lo, b.lo), half_join_pair(a.hi, b.hi)};
}
V16_FN v16i v16_join_keys(const v16 t[V16_KEY_DIMS])
{
    return v16_join_pair(t[0], t[1]);
}

V16_FN v16i v16i_add_values(v16i sum, v16i values, v16i weights)
{
    return (v16i){_mm256_add_epi32(sum.lo, _mm256_madd_epi16(values.lo, weights.lo)),
                  _mm256_add_epi32(sum.hi, _mm256_madd_epi16(values.hi, weights.hi))};
}
V16_FN v16i v16i_add_keys(v16i sum, v16i keys, v16i query)
{
    return v16i_add_values(sum, keys, query);
}

/* ---- 16 stored numbers to f32 --------------------------------------------------------------- */

V16_FN v16 v16_from_f16(__m256i h)
{
    return (v16){_mm256_cvtph_ps(_mm256_castsi256_si128(h)),
                 _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
V16_FN __m256i v16_to_f16(v16 a)
{
    return _mm256_set_m128i(_mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                            _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
V16_FN __m256 half_from_bf16(__m128i h)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
V16_FN v16 v16_from_bf16(__m256i h)
{
    return (v16){half_from_bf16(_mm256_castsi256_si128(h)),
                 half_from_bf16(_mm256_extracti128_si256(h, 1))};
}
V16_FN v16 v16_from_u8(__m128i b)
{
    return (v16){_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)),
                 _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
}
V16_FN __m256 half_from_e8m0(__m128i b)
{
    __m256i u = _mm256_cvtepu8_epi32(b);
    __m256i ends = _mm256_or_si256(_mm256_cmpeq_epi32(u, _mm256_setzero_si256()),
                                   _mm256_cmpeq_epi32(u, _mm256_set1_epi32(255)));
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(u, 23),
                                               _mm256_and_si256(ends, _mm256_set1_epi32(1 << 22))));
}
V16_FN v16 v16_from_e8m0(__m128i b)
{
    return (v16){half_from_e8m0(b), half_from_e8m0(_mm_srli_si128(b, 8))};
}

V16_FN v16 v16_from_e4m3_f16(__m256i h)
{
    __m256i nan = _mm256_cmpeq_epi16(_mm256_or_si256(h, _mm256_set1_epi16(INT16_MIN)),
                                     _mm256_set1_epi16((short)0xbf80));
    return v16_mul(v16_from_f16(_mm256_or_si256(h, nan)), v16_set1(256.0f));
}
V16_FN v16 v16_from_e4m3(__m128i b)
{
    return v16_from_e4m3_f16(_mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(b), 7),
                                              _mm256_set1_epi16((short)0xbfff)));
}

/* ---- bf16 of bf16.h ------------------------------------------------------------------------- */

V16_FN __m256 half_round_bf16(__m256 a)
{
    __m256i u = _mm256_castps_si256(a), sign = _mm256_set1_epi32(INT32_MIN);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i tiny = _mm256_cmpeq_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7f800000)),
                                      _mm256_setzero_si256());
    r = _mm256_and_si256(r, _mm256_set1_epi32((int)0xffff0000));
    return _mm256_castsi256_ps(_mm256_blendv_epi8(r, _mm256_and_si256(u, sign), tiny));
}
V16_FN v16 v16_round_bf16(v16 a)
{
    return v16_if_nan(a, v16_set1(NAN), (v16){half_round_bf16(a.lo), half_round_bf16(a.hi)});
}

V16_FN __m256 half_in_order(__m256 quarters)
{
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(quarters), 0xd8));
}
V16_FN v16 v16_odd(v16 a, v16 b)
{
    return (v16){half_in_order(_mm256_shuffle_ps(a.lo, a.hi, 0xdd)),
                 half_in_order(_mm256_shuffle_ps(b.lo, b.hi, 0xdd))};
}
V16_FN v16 v16_even(v16 a, v16 b)
{
    return (v16){half_in_order(_mm256_shuffle_ps(a.lo, a.hi, 0x88)),
                 half_in_order(_mm256_shuffle_ps(b.lo, b.hi, 0x88))};
}

V16_FN v16 v16_odd_bf16(v16i pairs)
{
    __m256i high = _mm256_set1_epi32((int)0xffff0000);
    return (v16){_mm256_castsi256_ps(_mm256_and_si256(pairs.lo, high)),
                 _mm256_castsi256_ps(_mm256_and_si256(pairs.hi, high))};
}
V16_FN v16 v16_even_bf16(v16i pairs)
{
    return (v16){_mm256_castsi256_ps(_mm256_slli_epi32(pairs.lo, 16)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(pairs.hi, 16))};
}

V16_FN v16 v16_odd_e4m3(__m256i pairs)
{
    return v16_from_e4m3_f16(
        _mm256_and_si256(_mm256_srai_epi16(pairs, 1), _mm256_set1_epi16((short)0xbf80)));
}
V16_FN v16 v16_even_e4m3(__m256i pairs)
{
    return v16_odd_e4m3(_mm256_slli_epi16(pairs, 8));
}

/* ---- packed codes --------------------------------------------------------------------------- */

#define SETR(...) _mm256_setr_epi32(__VA_ARGS__)

V16_FN v16i v16_spread(__m128i src, int bits)
{
    __m256i s = _mm256_broadcastsi128_si256(src);
    __m256i lo = _mm256_shuffle_epi8(s, SETR(EACH_LO(CODE_BYTES, bits)));
    __m256i hi = _mm256_shuffle_epi8(s, SETR(EACH_HI(CODE_BYTES, bits)));
    return (v16i){_mm256_srlv_epi32(lo, SETR(EACH_LO(CODE_SHIFT, bits))),
                  _mm256_srlv_epi32(hi, SETR(EACH_HI(CODE_SHIFT, bits)))};
}

/* A lookup has 8 entries here: enough for affine codes of up to 3 bits and for E2M1 without its
 * sign. */
typedef struct v16_group {
    __m256 a, b; /* table, or scale and bias */
} v16_group;

V16_FN v16_group v16_affine_group(int bits, float scale, float bias)
{
    __m256 s = _mm256_set1_ps(scale), b = _mm256_set1_ps(bias);
    if (bits > 3) return (v16_group){s, b};
    __m256i code =
        _mm256_and_si256(SETR(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((1 << bits) - 1));
    return (v16_group){_mm256_add_ps(_mm256_mul_ps(s, _mm256_cvtepi32_ps(code)), b), b};
}

V16_FN v16 v16_affine(int bits, __m128i src, v16_group g)
{
    v16 code;
    if (bits == 8) {
        code = v16_from_u8(src);
    } else {
        v16i c = v16_spread(src, bits);
        if (bits <= 3)
            return (v16){_mm256_permutevar8x32_ps(g.a, c.lo), _mm256_permutevar8x32_ps(g.a, c.hi)};
        __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
        code = (v16){_mm256_cvtepi32_ps(_mm256_and_si256(c.lo, mask)),
                     _mm256_cvtepi32_ps(_mm256_and_si256(c.hi, mask))};
    }
    return v16_add(v16_mul((v16){g.a, g.a}, code), (v16){g.b, g.b});
}

V16_FN v16_group v16_scale_group(float scale)
{
    return (v16_group){_mm256_set1_ps(scale), _mm256_setzero_ps()};
}
V16_FN v16 v16_scaled(v16 code, v16_group g)
{
    return v16_mul((v16){g.a, g.a}, code);
}

V16_FN v16_group v16_e2m1_group(float scale)
{
    __m256 size = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    __m256 s = _mm256_set1_ps(scale);
    return (v16_group){_mm256_mul_ps(s, size), s};
}

V16_FN __m256 half_e2m1(__m256i code, __m256 table)
{
    __m256i sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, code), _mm256_castsi256_ps(sign));
}

V16_FN v16 v16_e2m1(__m128i src, v16_group g)
{
    v16i c = v16_spread(src, 4);
    return (v16){half_e2m1(c.lo, g.a), half_e2m1(c.hi, g.a)};
}

#endif
