/* The products of bf16.h in plain C. */
#include "kern/bf16.h"

#include <math.h>

#include "kern/kern_const.h"
#include "num/fp.h"

int kern_takes_bf16(const num_matrix *w)
{
    if (w->cols % BF16_STEP != 0) return 0;
    return w->mode == NUM_BF16 || w->mode == NUM_MXFP8 ||
           (w->mode == NUM_FP8 && w->group % BF16_STEP == 0);
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

/* Times 2^60 a sum that is near the least normal number is rounded as with any exponent, and its
 * terms, which have 48 bits at most, do not get infinite. */
static float add_product(float a, float b, float sum)
{
    float w = flushed(a), r = fmaf(w, b, sum);
    int is_least = fabsf(r) <= 0x1p-126f && fabsf(fmaf(w, b * 0x1p60f, sum * 0x1p60f)) < 0x1p-66f;
    return is_least ? copysignf(0.0f, r) : r;
}

static void round_row(const float *x, int64_t cols, void *row)
{
    float *out = row;
    for (int64_t i = 0; i < cols; i++) out[i] = fp_bf16_decode(fp_bf16_encode(flushed(x[i])));
}

/* Columns that share what their sums are scaled by. */
static int64_t group_of(const num_matrix *w)
{
    return w->mode == NUM_FP8 ? w->group : w->cols;
}

static float scale_at(const num_matrix *w, int64_t row, int64_t group)
{
    int64_t n_groups = (w->cols + w->group - 1) / w->group;
    return num_element(w->scales, w->scale_dtype, row / w->tile_rows * n_groups + group);
}

/* A row as its sums take it: without scales of fp8, subnormal scales of mxfp8 taken for zeros. */
static void decode(const num_matrix *w, int64_t row, float *out)
{
    if (w->mode == NUM_FP8) {
        for (int64_t i = 0; i < w->cols; i++)
            out[i] = fp_e4m3_decode(w->codes[row * w->row_bytes + i]);
        return;
    }
    num_row_decode(w, row, out);
    if (w->mode != NUM_MXFP8) return;
    const uint8_t *scales = w->scales + row * (w->cols / w->group);
    for (int64_t i = 0; i < w->cols; i++)
        if (scales[i / w->group] == 0) out[i] *= 0.0f;
}

static float dot(const num_matrix *w, int64_t row, const float *values, const float *x)
{
    float sum[KERN_LANES] = {0};
    int64_t group = group_of(w);
    for (int64_t first = 0; first < w->cols; first += group) {
        int64_t end = first + group < w->cols ? first + group : w->cols;
        float lane[KERN_LANES] = {0};
        for (int64_t k = first; k < end; k += BF16_STEP)
            for (int j = 0; j < KERN_LANES; j++)
                for (int64_t i = k + 2 * j + 1; i >= k + 2 * j; i--)
                    lane[j] = add_product(values[i], x[i], lane[j]);
        for (int j = 0; j < KERN_LANES; j++)
            sum[j] = w->mode == NUM_FP8
                         ? add_product(scale_at(w, row, first / group), lane[j], sum[j])
                         : lane[j];
    }
    for (int half = KERN_LANES / 2; half >= 1; half /= 2)
        for (int j = 0; j < half; j++) sum[j] = flushed(sum[j] + sum[j + half]);
    return sum[0];
}

static void product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch)
{
    int64_t stride = kern_bf16_bytes(&kern_scalar, w->cols);
    for (int64_t r = 0; r < n_rows; r++) {
        decode(w, row + r, scratch);
        for (int64_t t = 0; t < n_x; t++)
            y[t * ldy + r] = dot(w, row + r, scratch,
                                 (const float *)(const void *)((const char *)x + t * stride));
    }
}

const kern_bf16_ops kern_scalar_bf16 = {.element = 4, .round = round_row, .product = product};
