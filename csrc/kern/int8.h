/* int8: products whose activations are rounded to 8 bits; the definition.
 *
 * A row of x is cut into blocks of 32. Where the largest magnitude a of a block is at least 2^-100,
 *   scale = a / 127,  q = x * (127 / a) rounded to even;
 * below that the block is zeros, and if it holds an infinity or a NaN its scale is NaN.
 *
 * A weight is scale * code + bias with an integer code: affine codes as stored, E2M1 doubled under
 * half the scale (nvfp4: times 1/2 / divisor, rounded; no quotient as in num_row_decode). Blocks
 * run in rising order through four partial sums:
 *   d = sum of code * q over the block, exact: below 2^24 for every mode
 *   part[block mod 4] = fma(d, scale * x_scale, part)
 *   part[block mod 4] = fma(bias, x_scale * sum of q, part)            affine only
 *   y = ((part 0 + part 2) + (part 1 + part 3)) + 0
 * nvfp4 has two scales in a block: the first half's term, then the second's. Adding zero at last
 * makes -0 a +0: what a missing block would have contributed leaves no trace.
 *
 * Integer sums are exact in any order, and no term depends on other rows or tokens: variants, cuts
 * of a batch and numbers of threads all agree to the bit. */
#ifndef KERN_INT8_H
#define KERN_INT8_H

#include "kern/kern.h"

/* Codes of E2M1 doubled and moved by this are 0 .. 24: unsigned, as byte products want them. */
enum { INT8_BLOCK = 32, INT8_PARTS = 4, INT8_E2M1_OFFSET = 12 };

/* Weights of a panel of rows that are laid out for a block product: per block of columns codes, two
 * numbers per row (scale and bias, or two scales). */
enum { INT8_PANEL_ROWS = 32, INT8_PANEL_BYTES = INT8_PANEL_ROWS * (INT8_BLOCK + 2 * 4) };

#define INT8_LEAST 0x1p-100f

/* A quantized row, padded by zero blocks to a multiple of four of them. `split` holds the even
 * columns of four blocks, then their odd ones: how the nibbles of 64 bytes come apart. */
typedef struct int8_row {
    int8_t *natural; /* [n_blocks][32] */
    int8_t *split;   /* [n_blocks / 4][2][4][16] */
    float *scale;    /* [n_blocks] */
    float *sum;      /* [n_blocks] scale * sum of q */
    int32_t *offset; /* [n_blocks] -12 * sum of q */
    int32_t *half;   /* [2 * n_blocks] the same for each 16 columns */
    int32_t *range;  /* [2] least and largest exponent of the scales; in AVX-512 */
} int8_row;

static inline int64_t int8_split_at(int64_t block)
{
    return block / 4 * 128 + block % 4 * 16;
}

static inline int64_t int8_n_blocks(int64_t cols)
{
    int64_t step = INT8_BLOCK * INT8_PARTS;
    return (cols + step - 1) / step * INT8_PARTS;
}

static inline int8_row int8_row_at(void *row, int64_t cols)
{
    int64_t n = int8_n_blocks(cols);
    int8_t *natural = row, *split = natural + n * INT8_BLOCK;
    float *scale = (float *)(void *)(split + n * INT8_BLOCK), *sum = scale + n;
    int32_t *offset = (int32_t *)(void *)(sum + n), *half = offset + n;
    return (int8_row){natural, split, scale, sum, offset, half, half + 2 * n};
}

static inline int int8_has_nibbles(const num_matrix *w)
{
    return w->mode == NUM_MXFP4 || w->mode == NUM_NVFP4 || w->bits == 4;
}

/* Scales in a row of w. */
static inline int64_t int8_n_groups(const num_matrix *w)
{
    return w->cols / w->group;
}

/* What every scale is multiplied with: the codes of E2M1 are doubled. */
static inline float int8_gain(const num_matrix *w)
{
    return w->mode == NUM_NVFP4 ? 0.5f / w->divisor : w->mode == NUM_MXFP4 ? 0.5f : 1.0f;
}

/* A block's scale and 127 / a, from its largest magnitude. */
static inline float int8_block_scale(float largest, int finite, float *inverse)
{
    *inverse = 0;
    if (!finite) return __builtin_nanf("");
    if (largest < INT8_LEAST) return 0;
    *inverse = 127.0f / largest;
    return largest / 127.0f;
}

/* The codes of a row as bytes, E2M1 doubled and moved; scale i of all, with the gain. */
void int8_codes(const num_matrix *w, int64_t row, uint8_t *codes);
float int8_scale(const num_matrix *w, int64_t i);

#ifndef MOONLET_SCALAR_ONLY
extern const kern_int8_ops kern_avx2_int8;
extern const kern_int8_ops kern_avx512vnni_int8;
extern const kern_int8_ops kern_avx512_int8;
extern const kern_int8_ops kern_amx_int8;
#endif
extern const kern_int8_ops kern_scalar_int8;

#endif
