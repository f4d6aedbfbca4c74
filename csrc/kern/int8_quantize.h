/* Rows of x in 8 bits: plain C in loops that compilers turn into vector code, compiled for each
 * instruction set that has nothing of its own. */
#ifndef KERN_INT8_QUANTIZE_H
#define KERN_INT8_QUANTIZE_H

#include <string.h>

#include "kern/int8.h"
#include "num/fp.h"

#define EACH_COLUMN for (int k = 0; k < INT8_BLOCK; k++)

static inline void int8_quantize_block(const float *x, int64_t b, int8_row row)
{
    uint32_t bits[INT8_BLOCK], largest = 0;
    int32_t q[INT8_BLOCK], sum[2] = {0, 0};
    float inverse, round = 0x1.8p23f; /* adding it rounds, into the low bits */
    memcpy(bits, x, sizeof bits);
    EACH_COLUMN bits[k] &= 0x7fffffff;
    EACH_COLUMN largest = bits[k] > largest ? bits[k] : largest;
    int finite = largest < 0x7f800000;
    row.scale[b] = int8_block_scale(fp_from_bits(largest), finite, &inverse);

    EACH_COLUMN
    {
        float t = x[k] * inverse + round;
        memcpy(&q[k], &t, sizeof t);
    }
    EACH_COLUMN q[k] = (q[k] - 0x4b400000) & -finite;
    for (int k = 0; k < INT8_BLOCK / 2; k++) sum[0] += q[k];
    for (int k = INT8_BLOCK / 2; k < INT8_BLOCK; k++) sum[1] += q[k];
    EACH_COLUMN row.natural[b * INT8_BLOCK + k] = (int8_t)q[k];
    int8_t *split = row.split + int8_split_at(b);
    for (int k = 0; k < INT8_BLOCK / 2; k++) split[k] = (int8_t)q[2 * k];
    for (int k = 0; k < INT8_BLOCK / 2; k++) split[64 + k] = (int8_t)q[2 * k + 1];
    row.half[2 * b] = -INT8_E2M1_OFFSET * sum[0];
    row.half[2 * b + 1] = -INT8_E2M1_OFFSET * sum[1];
    row.offset[b] = row.half[2 * b] + row.half[2 * b + 1];
    row.sum[b] = row.scale[b] * (float)(sum[0] + sum[1]);
}

static void int8_quantize(const float *x, int64_t cols, void *out)
{
    int8_row row = int8_row_at(out, cols);
    int64_t n = cols / INT8_BLOCK;
    if (n % INT8_PARTS) memset(out, 0, (size_t)kern_int8_bytes(cols));
    for (int64_t b = 0; b < n; b++) int8_quantize_block(x + b * INT8_BLOCK, b, row);
}

#undef EACH_COLUMN

#endif
