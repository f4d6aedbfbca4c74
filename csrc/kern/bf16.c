/* The products of bf16.h in plain C. */
#include "kern/bf16.h"

#include <math.h>

#include "kern/kern_const.h"
#include "num/fp.h"

int kern_takes_bf16(const num_matrix *w)
{
    return (w->mode == NUM_BF16 || w->mode == NUM_MXFP8) && w->cols % BF16_STEP == 0;
}

/* Rows of a multiple of 4096 bytes would all begin in the same set of a first-level cache. */
int64_t kern_bf16_bytes(const kern_ops *ops, int64_t cols)
{
    return cols * ops->bf16->element + 64;
}

static float flushed(float f)
{
    return fp_bits(f) & 0x7f800000u ? f : copysignf(0.0f, f);
}

/* In f64 the product is exact, and the sum near enough to tell on which side of the last number
 * that rounds to a subnormal one it is. */
static float add_product(float a, float b, float sum)
{
    const double least = 0x1p-126 * (1 - 0x1p-25);
    float w = flushed(a), r = fmaf(w, b, sum);
    return fabs((double)w * b + sum) < least ? copysignf(0.0f, r) : r;
}

static void round_row(const float *x, int64_t cols, void *row)
{
    float *out = row;
    for (int64_t i = 0; i < cols; i++) out[i] = fp_bf16_decode(fp_bf16_encode(flushed(x[i])));
}

static float dot(const float *w, const float *x, int64_t cols)
{
    float lane[KERN_LANES] = {0};
    for (int64_t k = 0; k < cols; k += BF16_STEP)
        for (int j = 0; j < KERN_LANES; j++)
            for (int odd = 1; odd >= 0; odd--) {
                int64_t i = k + 2 * j + odd;
                lane[j] = add_product(w[i], x[i], lane[j]);
            }
    for (int half = KERN_LANES / 2; half >= 1; half /= 2)
        for (int j = 0; j < half; j++) lane[j] = flushed(lane[j] + lane[j + half]);
    return lane[0];
}

/* The row with subnormal scales taken for zeros. */
static void decode(const num_matrix *w, int64_t row, float *out)
{
    num_row_decode(w, row, out);
    if (w->mode != NUM_MXFP8) return;
    const uint8_t *scales = w->scales + row * (w->cols / w->group);
    for (int64_t i = 0; i < w->cols; i++)
        if (scales[i / w->group] == 0) out[i] *= 0.0f;
}

static void product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch)
{
    int64_t stride = kern_bf16_bytes(&kern_scalar, w->cols);
    for (int64_t r = 0; r < n_rows; r++) {
        decode(w, row + r, scratch);
        for (int64_t t = 0; t < n_x; t++)
            y[t * ldy + r] =
                dot(scratch, (const float *)(const void *)((const char *)x + t * stride), w->cols);
    }
}

const kern_bf16_ops kern_scalar_bf16 = {.element = 4, .round = round_row, .product = product};
