/* Codes of two bits, two rows to a register: 32 bytes of each are four blocks, and shifts alone
 * bring a code to its byte. Byte j of them holds columns 4 j .. 4 j + 3, so a row of x is wanted in
 * quarters: columns 4 j, then 4 j + 1 and so on. Included by int8_gemv512.h. */
#ifndef KERN_INT8_PAIRS512_H
#define KERN_INT8_PAIRS512_H

#include "kern/int8_load512.h"

/* Element i of sums belongs to this row of four and this block of four. */
#define PAIR_ROW(i)           ((i) / 8 + (i) / 2 % 2 * 2)
#define PAIR_BLOCK(i, unused) ((i) / 4 % 2 * 2 + (i) % 2)

/* Where element i of [block][row] is among them, and the other way round. */
#define PAIR_TO(i, unused)   ((i) % 2 * 8 + (i) / 2 % 2 * 2 + (i) / 8 * 4 + (i) / 4 % 2)
#define PAIR_FROM(i, unused) (PAIR_BLOCK(i, unused) * 4 + PAIR_ROW(i))

V16_FN int is_paired(num_mode mode, int bits)
{
    return mode == NUM_AFFINE && bits == 2;
}

V16_FN v16 to_pairs(v16 numbers)
{
    return _mm512_permutexvar_ps(SETR(EACH_LO(PAIR_FROM, 0), EACH_HI(PAIR_FROM, 0)), numbers);
}

V16_FN v16 from_pairs(v16 numbers)
{
    return _mm512_permutexvar_ps(SETR(EACH_LO(PAIR_TO, 0), EACH_HI(PAIR_TO, 0)), numbers);
}

/* out: [n_blocks / 4][4][32] */
V16_FN void make_quarters(int8_row x, int64_t n_blocks, int8_t *out)
{
    __m512i fourth =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i first = SETR(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    for (int64_t at = 0; at < n_blocks * INT8_BLOCK; at += 128) {
        __m512i a = _mm512_shuffle_epi8(_mm512_loadu_si512(x.natural + at), fourth);
        __m512i c = _mm512_shuffle_epi8(_mm512_loadu_si512(x.natural + at + 64), fourth);
        _mm512_storeu_si512(out + at, _mm512_permutex2var_epi32(a, first, c));
        _mm512_storeu_si512(out + at + 64, _mm512_permutex2var_epi32(a, last, c));
    }
}

/* n <= 128 codes of each row, zeros behind them: out[k] are columns 4 j + k. */
V16_FN void load_pair(const uint8_t *row, const uint8_t *other, int64_t n, __m512i out[4])
{
    __m512i mask = _mm512_set1_epi8(3);
    __mmask32 there = (__mmask32)first_bytes(n / 4);
    __m256i low = _mm256_maskz_loadu_epi8(there, row), high = _mm256_maskz_loadu_epi8(there, other);
    __m512i raw = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    out[0] = _mm512_and_si512(raw, mask);
    out[1] = _mm512_and_si512(_mm512_srli_epi16(raw, 2), mask);
    out[2] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
    out[3] = _mm512_and_si512(_mm512_srli_epi16(raw, 6), mask);
}

/* Sums of 16 products for rows 0 and 1, whose codes come first, and rows 2 and 3. */
V16_FN void pair_dots(const __m512i code[8], const int8_t *quarters, __m512i sum[2])
{
    sum[0] = sum[1] = _mm512_setzero_si512();
    _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++)
    {
        __m256i q = _mm256_loadu_si256((const void *)(quarters + 32 * k));
        __m512i x = _mm512_broadcast_i64x4(q);
        sum[0] = _mm512_dpbusd_epi32(sum[0], code[k], x);
        sum[1] = _mm512_dpbusd_epi32(sum[1], code[4 + k], x);
    }
}

#endif
