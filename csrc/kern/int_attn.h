/* int_attn: attention in integers; the definition.
 *
 * A query or key is cut into parts of 64 dimensions, the last one may be shorter, and each part is
 * rounded to steps of its largest magnitude a over 127; the row of a value as a whole, to steps of
 * a over 2047. Where a is at least 2^-100,
 *   scale = a / steps,  code = fma(x, steps / a, 1.5 * 2^23) - 1.5 * 2^23: rounded to even
 * below that codes are zeros and the scale is 0; with an infinity or a NaN the scale is NaN.
 *
 * For a query and n <= KERN_BLOCK positions j, with an exact integer sum over the codes of part g:
 *   d[j][g] = sum of q_code k_code
 *   s[j] = fma(d[j][g], k_scale[j][g] * (q_scale[g] * factor), s[j]), g rising, from +0
 *   top, e, sum as kern_ops.attend has them
 *   w[j] = e[j] * v_scale[j];  p the codes of w in 4095 steps, all n in one part
 *   out[i] = (sum over j of p[j] v_code[j][i]) * w_scale
 * The last sum is exact too: 256 * 4095 * 2047 < 2^31.
 *
 * A position's codes depend on nothing but its own key and value, and the weights' on the query and
 * what it sees of the block: so results depend neither on how a prompt is cut nor on the variant.
 */
#ifndef KERN_INT_ATTN_H
#define KERN_INT_ATTN_H

#include "kern/kern.h"
#include "num/fp.h"

enum {
    INT_ATTN_PART = KERN_KEY_PART,
    INT_KEY_STEPS = 127,
    INT_VALUE_STEPS = 2047,
    INT_WEIGHT_STEPS = 4095
};

/* Unsigned codes of keys, as byte products want them, are moved by this. */
enum { INT_KEY_OFFSET = 128 };

#define INT_ATTN_LEAST 0x1p-100f
/* Adding it rounds, into the low bits. Those of NaNs are anything, their scale sees to the rest. */
#define INT_ATTN_ROUND 0x1.8p23f

/* dim rounded up to whole parts. */
static inline int64_t int_attn_width(int64_t dim)
{
    return kern_key_parts(dim) * INT_ATTN_PART;
}

/* A query: codes, padded with zeros to whole parts, in both widths; numbers of each part. */
typedef struct int_query {
    int16_t *wide;
    int8_t *codes;
    float *scale;
    int32_t *offset; /* -INT_KEY_OFFSET * sum of codes */
} int_query;

static inline int_query int_query_at(const void *row, int64_t dim)
{
    int64_t width = int_attn_width(dim), n_parts = width / INT_ATTN_PART;
    int16_t *wide = (int16_t *)(uintptr_t)row;
    int8_t *codes = (int8_t *)(wide + width);
    float *scale = (float *)(void *)(codes + width);
    return (int_query){wide, codes, scale, (int32_t *)(void *)(scale + n_parts)};
}

/* A block of keys and values. The order of the codes is the variant's own. */
typedef struct int_block {
    void *keys;
    int16_t *values;
    float *key_scale;   /* [parts][KERN_BLOCK] */
    float *value_scale; /* [KERN_BLOCK] */
} int_block;

static inline int_block int_block_at(const void *block, int64_t dim)
{
    int64_t width = int_attn_width(dim), n_parts = width / INT_ATTN_PART;
    int16_t *keys = (int16_t *)(uintptr_t)block, *values = keys + KERN_BLOCK * width;
    float *key_scale = (float *)(void *)(values + KERN_BLOCK * width);
    return (int_block){keys, values, key_scale, key_scale + KERN_BLOCK * n_parts};
}

/* The scale of codes whose largest magnitude has these bits, and steps / a. */
static inline float int_attn_scale(uint32_t largest, int steps, float *inverse)
{
    float a = fp_from_bits(largest);
    *inverse = 0;
    if (largest >= 0x7f800000) return __builtin_nanf("");
    if (a < INT_ATTN_LEAST) return 0;
    *inverse = (float)steps / a;
    return a / (float)steps;
}

static inline int32_t int_attn_code(float x, float inverse)
{
    return (int32_t)(fp_bits(__builtin_fmaf(x, inverse, INT_ATTN_ROUND)) - 0x4b400000);
}

/* Plain C in loops that compilers turn into vector code, compiled for each instruction set. */
static inline void int_attn_query(const float *q, int64_t dim, float factor, void *row)
{
    int_query to = int_query_at(row, dim);
    for (int64_t g = 0; g * INT_ATTN_PART < dim; g++) {
        float x[INT_ATTN_PART] = {0}, inverse;
        int16_t *wide = to.wide + g * INT_ATTN_PART;
        int8_t *codes = to.codes + g * INT_ATTN_PART;
        uint32_t largest = 0;
        int32_t sum = 0;
        for (int64_t i = g * INT_ATTN_PART; i < dim && i < (g + 1) * INT_ATTN_PART; i++)
            x[i % INT_ATTN_PART] = q[i];
        for (int i = 0; i < INT_ATTN_PART; i++) {
            uint32_t size = fp_bits(x[i]) & 0x7fffffff;
            largest = size > largest ? size : largest;
        }
        to.scale[g] = int_attn_scale(largest, INT_KEY_STEPS, &inverse) * factor;
        for (int i = 0; i < INT_ATTN_PART; i++) wide[i] = (int16_t)int_attn_code(x[i], inverse);
        for (int i = 0; i < INT_ATTN_PART; i++) codes[i] = (int8_t)wide[i];
        for (int i = 0; i < INT_ATTN_PART; i++) sum += codes[i];
        to.offset[g] = -INT_KEY_OFFSET * sum;
    }
}

extern const kern_attn_ops kern_scalar_attn;

#endif
