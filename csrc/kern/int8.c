/* Products with 8-bit activations in plain C: the definition of int8.h step by step. */
#include "kern/int8.h"

#include <math.h>
#include <string.h>

#include "kern/int8_quantize.h"
#include "num/fp.h"

int kern_takes_int8(const num_matrix *w)
{
    if (w->cols % INT8_BLOCK != 0) return 0;
    if (w->mode == NUM_AFFINE) return w->group % INT8_BLOCK == 0;
    return w->mode == NUM_MXFP4 || w->mode == NUM_NVFP4;
}

int64_t kern_int8_bytes(int64_t cols)
{
    int64_t n = int8_n_blocks(cols), of_block = 2 * INT8_BLOCK + 5 * (int64_t)sizeof(float);
    return (n * of_block + 2 * (int64_t)sizeof(int32_t) + 63) / 64 * 64;
}

/* ---- rows of w ------------------------------------------------------------------------------ */

void int8_codes(const num_matrix *w, int64_t row, uint8_t *codes)
{
    static const uint8_t e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    const uint8_t *p = w->codes + row * w->row_bytes;
    int is_e2m1 = w->mode != NUM_AFFINE, mask = (1 << w->bits) - 1;
    for (int64_t k = 0; k < w->cols; k += 8, p += w->bits) {
        uint64_t eight = 0;
        memcpy(&eight, p, (size_t)w->bits);
        for (int j = 0; j < 8; j++) {
            int code = (int)(eight >> j * w->bits) & mask;
            codes[k + j] = is_e2m1 ? e2m1[code] : (uint8_t)code;
        }
    }
}

float int8_scale(const num_matrix *w, int64_t i)
{
    switch (w->mode) {
    case NUM_MXFP4: return fp_e8m0_decode(w->scales[i]) * int8_gain(w);
    case NUM_NVFP4: return fp_e4m3_decode(w->scales[i]) * int8_gain(w);
    default: return num_element(w->scales, w->scale_dtype, i);
    }
}

/* ---- products ------------------------------------------------------------------------------- */

static int dot(const uint8_t *codes, const int8_t *q, int n)
{
    int sum = 0;
    for (int k = 0; k < n; k++) sum += codes[k] * q[k];
    return sum;
}

static float product_of(const num_matrix *w, int64_t row, const uint8_t *codes, int8_row x)
{
    float part[INT8_PARTS] = {0};
    int64_t first = row * int8_n_groups(w);
    for (int64_t b = 0; b < w->cols / INT8_BLOCK; b++) {
        float *sum = &part[b % INT8_PARTS], x_scale = x.scale[b];
        const uint8_t *c = codes + b * INT8_BLOCK;
        const int8_t *q = x.natural + b * INT8_BLOCK;
        int64_t g = first + b * INT8_BLOCK / w->group;
        if (w->mode == NUM_NVFP4) {
            for (int h = 0; h < 2; h++)
                *sum = fmaf((float)(dot(c + 16 * h, q + 16 * h, 16) + x.half[2 * b + h]),
                            int8_scale(w, g + h) * x_scale, *sum);
            continue;
        }
        int d = dot(c, q, INT8_BLOCK) + (w->mode == NUM_MXFP4 ? x.offset[b] : 0);
        *sum = fmaf((float)d, int8_scale(w, g) * x_scale, *sum);
        if (w->mode == NUM_AFFINE)
            *sum = fmaf(num_element(w->biases, w->bias_dtype, g), x.sum[b], *sum);
    }
    return ((part[0] + part[2]) + (part[1] + part[3])) + 0.0f;
}

static void product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch)
{
    int64_t stride = kern_int8_bytes(w->cols);
    for (int64_t r = 0; r < n_rows; r++) {
        int8_codes(w, row + r, scratch);
        for (int64_t t = 0; t < n_x; t++)
            y[t * ldy + r] = product_of(w, row + r, scratch,
                                        int8_row_at((char *)(uintptr_t)x + t * stride, w->cols));
    }
}

const kern_int8_ops kern_scalar_int8 = {.quantize = int8_quantize, .product = product};
