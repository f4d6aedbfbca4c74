/* v16 as one AVX-512 register: the vocabulary in which vector_*.h are written. v16_avx2.h has the
 * same names; what they mean is said here only. All pointers may be unaligned, no function reads
 * or writes a byte outside of what its name says. */
#ifndef KERN_V16_H
#define KERN_V16_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include "kern/int_attn.h"
#include "kern/kern_const.h"

#define V16_FIT kern_avx512_fit
#define V16_ROW kern_avx512_row
#define V16_FN  static inline __attribute__((always_inline))

/* Rows x tokens of one register block of `dots`, and rows of a fused product. */
enum { V16_DOT_ROWS = 4, V16_DOT_TOKENS = 4, V16_FUSED_ROWS = 4 };

/* Queries x registers of columns of one register block of `attend`. */
enum { V16_MIX_ROWS = 8, V16_MIX_COLS = 2 };

/* Dimensions of a key that meet a query in one instruction, and what is added to their codes. */
#ifdef __AVX512VNNI__
enum { V16_KEY_DIMS = 4, V16_KEY_OFFSET = INT_KEY_OFFSET };
#else
enum { V16_KEY_DIMS = 2, V16_KEY_OFFSET = 0 };
#endif

typedef __m512 v16;
typedef __m512i v16i;

V16_FN v16 v16_zero(void)
{
    return _mm512_setzero_ps();
}
V16_FN v16 v16_set1(float f)
{
    return _mm512_set1_ps(f);
}
V16_FN v16 v16_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
V16_FN void v16_store(float *p, v16 a)
{
    _mm512_storeu_ps(p, a);
}
V16_FN v16 v16_add(v16 a, v16 b)
{
    return _mm512_add_ps(a, b);
}
V16_FN v16 v16_sub(v16 a, v16 b)
{
    return _mm512_sub_ps(a, b);
}
V16_FN v16 v16_mul(v16 a, v16 b)
{
    return _mm512_mul_ps(a, b);
}
V16_FN v16 v16_div(v16 a, v16 b)
{
    return _mm512_div_ps(a, b);
}
V16_FN v16 v16_fma(v16 a, v16 b, v16 c)
{
    return _mm512_fmadd_ps(a, b, c);
}

/* Only the first n lanes, 0 <= n <= 16; the others load as, or become, +0. */
V16_FN __mmask16 v16_mask(int64_t n)
{
    return (__mmask16)((1u << n) - 1);
}
V16_FN v16 v16_load_n(const float *p, int64_t n)
{
    return _mm512_maskz_loadu_ps(v16_mask(n), p);
}
V16_FN void v16_store_n(float *p, v16 a, int64_t n)
{
    _mm512_mask_storeu_ps(p, v16_mask(n), a);
}
V16_FN v16 v16_first(v16 a, int64_t n)
{
    return _mm512_maskz_mov_ps(v16_mask(n), a);
}

/* a > b ? yes : no; a NaN means no. And: is a NaN ? yes : no. */
V16_FN v16 v16_if_gt(v16 a, v16 b, v16 yes, v16 no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
V16_FN v16 v16_if_nan(v16 a, v16 yes, v16 no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), no, yes);
}

/* Adds (t << 23) to the bits of p. */
V16_FN v16 v16_add_exponent(v16 p, v16 t)
{
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}

/* Lanes j and j + 8 added: the first step of the tree. */
V16_FN __m256 v16_halves(v16 a)
{
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

/* Lane L of quarter i is p[16 L + 4 i ...]: four columns of a [16][4] array, in 128-bit lanes. */
V16_FN v16 v16_load_quarters(const float *p)
{
    v16 a = _mm512_castps128_ps512(_mm_loadu_ps(p));
    a = _mm512_insertf32x4(a, _mm_loadu_ps(p + 16), 1);
    a = _mm512_insertf32x4(a, _mm_loadu_ps(p + 32), 2);
    return _mm512_insertf32x4(a, _mm_loadu_ps(p + 48), 3);
}
V16_FN v16 v16_unpack_lo(v16 a, v16 b)
{
    return _mm512_unpacklo_ps(a, b);
}
V16_FN v16 v16_unpack_hi(v16 a, v16 b)
{
    return _mm512_unpackhi_ps(a, b);
}
V16_FN v16 v16_join_lo(v16 a, v16 b)
{
    return _mm512_shuffle_ps(a, b, 0x44);
}
V16_FN v16 v16_join_hi(v16 a, v16 b)
{
    return _mm512_shuffle_ps(a, b, 0xee);
}

/* n < 64 bytes and zeros up to 64. */
V16_FN void v16_copy_bytes(uint8_t *to, const uint8_t *from, int64_t n)
{
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, from));
}

/* ---- integers in attention ------------------------------------------------------------------ */

/* What is larger without its sign, NaN above all; `a` has none. And the bits of the largest lane.
 */
V16_FN v16 v16_max_size(v16 a, v16 b)
{
    v16i size = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32(INT32_MAX));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), size));
}
V16_FN uint32_t v16_top_bits(v16 a)
{
    return (uint32_t)_mm512_reduce_max_epi32(_mm512_castps_si512(a));
}

V16_FN v16i v16i_load(const void *p)
{
    return _mm512_loadu_si512(p);
}
V16_FN void v16i_store(void *p, v16i a)
{
    _mm512_storeu_si512(p, a);
}
V16_FN v16i v16i_set1(int32_t i)
{
    return _mm512_set1_epi32(i);
}
V16_FN v16 v16_from_i32(v16i a)
{
    return _mm512_cvtepi32_ps(a);
}

/* The low 16 bits of each lane. */
V16_FN void v16_store_low(void *p, v16 a)
{
    _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(_mm512_castps_si512(a)));
}
/* The low 16 bits of a and b in each lane; the low bits of V16_KEY_DIMS numbers. */
V16_FN v16i v16_join_pair(v16 a, v16 b)
{
    v16i high = _mm512_slli_epi32(_mm512_castps_si512(b), 16);
    return _mm512_mask_mov_epi16(high, 0x55555555, _mm512_castps_si512(a));
}
/* v16i_add_*: sum + products of a lane's V16_KEY_DIMS codes, or of its two values and weights. */
#ifdef __AVX512VNNI__
V16_FN v16i v16_join_keys(const v16 t[V16_KEY_DIMS])
{
    v16i low = _mm512_set1_epi32(0x00ff00ff);
    v16i even = v16_join_pair(t[0], t[2]), odd = v16_join_pair(t[1], t[3]);
    /* low ? even : odd << 8 */
    return _mm512_ternarylogic_epi32(low, even, _mm512_slli_epi32(odd, 8), 0xca);
}

V16_FN v16i v16i_add_keys(v16i sum, v16i keys, v16i query)
{
    return _mm512_dpbusd_epi32(sum, keys, query);
}
V16_FN v16i v16i_add_values(v16i sum, v16i values, v16i weights)
{
    return _mm512_dpwssd_epi32(sum, values, weights);
}
#else
V16_FN v16i v16_join_keys(const v16 t[V16_KEY_DIMS])
{
    return v16_join_pair(t[0], t[1]);
}

V16_FN v16i v16i_add_values(v16i sum, v16i values, v16i weights)
{
    return _mm512_add_epi32(sum, _mm512_madd_epi16(values, weights));
}
V16_FN v16i v16i_add_keys(v16i sum, v16i keys, v16i query)
{
    return v16i_add_values(sum, keys, query);
}
#endif

/* ---- 16 stored numbers to f32 --------------------------------------------------------------- */

V16_FN v16 v16_from_f16(__m256i h)
{
    return _mm512_cvtph_ps(h);
}
V16_FN __m256i v16_to_f16(v16 a)
{
    return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
V16_FN v16 v16_from_bf16(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
V16_FN v16 v16_from_u8(__m128i b)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b));
}

V16_FN v16 v16_from_e8m0(__m128i b)
{
    /* 0 is 2^-127, a subnormal; 255 is NaN: both have the top mantissa bit besides the exponent */
    v16i u = _mm512_cvtepu8_epi32(b), exponent = _mm512_slli_epi32(u, 23);
    __mmask16 ends = _mm512_cmpeq_epi32_mask(u, _mm512_setzero_si512()) |
                     _mm512_cmpeq_epi32_mask(u, _mm512_set1_epi32(255));
    return _mm512_castsi512_ps(
        _mm512_mask_or_epi32(exponent, ends, exponent, _mm512_set1_epi32(1 << 22)));
}

/* E4M3 passes through the f16 of the same sign, exponent and mantissa bits, which is 2^-8 of the
 * value, subnormals included; only the two NaNs are none there. */
V16_FN v16 v16_from_e4m3_f16(__m256i h, __mmask16 numbers)
{
    return _mm512_mask_mul_ps(_mm512_set1_ps(NAN), numbers, _mm512_cvtph_ps(h),
                              _mm512_set1_ps(256.0f));
}
V16_FN v16 v16_from_e4m3(__m128i b)
{
    __mmask16 numbers =
        _mm_cmpneq_epi8_mask(_mm_or_si128(b, _mm_set1_epi8(INT8_MIN)), _mm_set1_epi8(-1));
    __m256i h = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(b), 7),
                                 _mm256_set1_epi16((short)0xbfff));
    return v16_from_e4m3_f16(h, numbers);
}

/* ---- bf16 of bf16.h ------------------------------------------------------------------------- */

V16_FN v16 v16_round_bf16(v16 a)
{
    v16i u = _mm512_castps_si512(a), sign = _mm512_set1_epi32(INT32_MIN);
    v16i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    v16i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    r = _mm512_and_si512(r, _mm512_set1_epi32((int)0xffff0000));
    r = _mm512_mask_and_epi32(r, _mm512_testn_epi32_mask(u, _mm512_set1_epi32(0x7f800000)), u,
                              sign);
    return v16_if_nan(a, v16_set1(NAN), _mm512_castsi512_ps(r));
}

/* Of 32 numbers those in odd and in even places. */
V16_FN v16 v16_odd(v16 a, v16 b)
{
    return _mm512_permutex2var_ps(
        a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b);
}
V16_FN v16 v16_even(v16 a, v16 b)
{
    return _mm512_permutex2var_ps(
        a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
}

/* The same of 32 stored bf16 numbers. */
V16_FN v16 v16_odd_bf16(v16i pairs)
{
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}
V16_FN v16 v16_even_bf16(v16i pairs)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}

/* The upper bytes of 16 pairs of E4M3 codes, and the lower ones. */
V16_FN v16 v16_odd_e4m3(__m256i pairs)
{
    __m256i code = _mm256_set1_epi16(0x7f00);
    __mmask16 numbers = _mm256_cmpneq_epi16_mask(_mm256_and_si256(pairs, code), code);
    __m256i h = _mm256_and_si256(_mm256_srai_epi16(pairs, 1), _mm256_set1_epi16((short)0xbf80));
    return v16_from_e4m3_f16(h, numbers);
}
V16_FN v16 v16_even_e4m3(__m256i pairs)
{
    return v16_odd_e4m3(_mm256_slli_epi16(pairs, 8));
}

/* ---- packed codes --------------------------------------------------------------------------- */

/* Lane j: the two bytes that hold code j of `bits` <= 7, shifted so that it starts at bit 0. What
 * lies above the code is not cleared. `src` holds 16 codes in its first 2 * bits bytes. */
#define SETR(...) _mm512_setr_epi32(__VA_ARGS__)

V16_FN v16i v16_spread(__m128i src, int bits)
{
    v16i pairs = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(src),
                                     SETR(EACH_LO(CODE_BYTES, bits), EACH_HI(CODE_BYTES, bits)));
    return _mm512_srlv_epi32(pairs, SETR(EACH_LO(CODE_SHIFT, bits), EACH_HI(CODE_SHIFT, bits)));
}

/* What turns the codes of one group into numbers. Up to 5 bits every possible value is worked out
 * once per group and looked up. */
typedef struct v16_group {
    v16 a, b; /* table of codes 0-15 and 16-31, or scale and bias */
} v16_group;

V16_FN v16 v16_affine_table(int first, int bits, v16 scale, v16 bias)
{
    v16i code = SETR(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (bits < 4) code = _mm512_and_si512(code, _mm512_set1_epi32((1 << bits) - 1));
    code = _mm512_add_epi32(code, _mm512_set1_epi32(first));
    return v16_add(v16_mul(scale, _mm512_cvtepi32_ps(code)), bias);
}

V16_FN v16_group v16_affine_group(int bits, float scale, float bias)
{
    v16 s = v16_set1(scale), b = v16_set1(bias);
    if (bits > 5) return (v16_group){s, b};
    v16_group g = {v16_affine_table(0, bits, s, b), b};
    if (bits == 5) g.b = v16_affine_table(16, bits, s, b);
    return g;
}

V16_FN v16 v16_affine(int bits, __m128i src, v16_group g)
{
    if (bits == 8) return v16_add(v16_mul(g.a, v16_from_u8(src)), g.b);
    v16i code = v16_spread(src, bits);
    if (bits <= 4) return _mm512_permutexvar_ps(code, g.a);
    if (bits == 5) return _mm512_permutex2var_ps(g.a, code, g.b);
    code = _mm512_and_si512(code, _mm512_set1_epi32((1 << bits) - 1));
    return v16_add(v16_mul(g.a, _mm512_cvtepi32_ps(code)), g.b);
}

V16_FN v16_group v16_scale_group(float scale)
{
    return (v16_group){v16_set1(scale), v16_zero()};
}
V16_FN v16 v16_scaled(v16 code, v16_group g)
{
    return v16_mul(g.a, code);
}

V16_FN v16_group v16_e2m1_group(float scale)
{
    v16 code = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f,
                              -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    v16 s = v16_set1(scale);
    return (v16_group){v16_mul(s, code), s};
}

V16_FN v16 v16_e2m1(__m128i src, v16_group g)
{
    return _mm512_permutexvar_ps(v16_spread(src, 4), g.a);
}

#endif
