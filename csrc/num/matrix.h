/* matrix: how a weight matrix lies in a checkpoint, in one struct.
 *
 * A num_matrix borrows bytes (normally from a mapped file) and never owns them. A row is a
 * little-endian bit stream, element k in bits [k*bits, (k+1)*bits); `cols` run along the input.
 * Pointers may have any alignment: MLX writes headers without padding.
 *
 *   mode        codes            scales                       biases        value
 *   f32 f16 bf16  the elements   -                            -             element
 *   affine      bits 1..8        float per group              float/group   scale*code + bias
 *   mxfp4       E2M1             E8M0 per 32                  -             scale*code
 *   mxfp8       E4M3             E8M0 per 32                  -             scale*code
 *   nvfp4       E2M1             E4M3 per 16                  -             (scale/divisor)*code
 *   fp8         E4M3             float per (tile_rows, group) -             scale*code
 *
 * An affine product is rounded before the sum; every other value is one rounded product (nvfp4:
 * after its rounded quotient). A NaN scale (E8M0 255, E4M3 0x7f) makes its whole group NaN, an
 * E4M3 code 0x7f or 0xff one value. Sources: mlx/ops.cpp (quantize), compressed-tensors'
 * compressors. */
#ifndef NUM_MATRIX_H
#define NUM_MATRIX_H

#include <stdint.h>

typedef enum num_mode {
    NUM_F32,
    NUM_F16,
    NUM_BF16,
    NUM_AFFINE,
    NUM_MXFP4,
    NUM_MXFP8,
    NUM_NVFP4,
    NUM_FP8,
    NUM_N_MODES
} num_mode;

typedef enum num_dtype { NUM_DT_F32, NUM_DT_F16, NUM_DT_BF16, NUM_DT_U8 } num_dtype;

typedef struct num_matrix {
    num_mode mode;
    num_dtype scale_dtype, bias_dtype; /* affine and fp8; the other modes imply U8 */
    int bits;                          /* per code: 1..8, 16 or 32 */
    int64_t rows, cols;                /* 1 or more: whoever makes a matrix sees to it */
    int64_t group;         /* columns that share a scale; divides cols, except fp8's last tile */
    int64_t tile_rows;     /* fp8: rows that share a scale; 1 elsewhere */
    const uint8_t *codes;  /* [rows][row_bytes] */
    const uint8_t *scales; /* [ceil(rows/tile_rows)][ceil(cols/group)] of scale_dtype */
    const uint8_t *biases; /* [rows][cols/group] of bias_dtype; affine only */
    int64_t row_bytes;     /* cols*bits/8 */
    float divisor;         /* nvfp4: compressed-tensors' weight_global_scale, 2688 / MLX's
                              global_scale, or 1 */
} num_matrix;

/* "f32", "bf16", "affine", "mxfp4", ...: the words used in Lua and on the command line. */
const char *num_mode_name(num_mode mode);

/* The mode of that name into *mode; 0 when there is none. */
int num_mode_parse(const char *name, num_mode *mode);

/* Bytes of one element: 4, 2, 2, 1. */
int num_dtype_bytes(num_dtype dtype);

/* Element i of an array of f32, f16 or bf16 at any alignment. */
float num_element(const uint8_t *data, num_dtype dtype, int64_t i);

/* n elements from element `first` on. */
void num_elements_decode(const uint8_t *data, num_dtype dtype, int64_t first, int64_t n,
                         float *out);

/* Bytes of all rows with scales and biases: what a pass over the matrix reads. */
int64_t num_matrix_bytes(const num_matrix *m);

/* Row `row` as f32 into out[cols]: the definition; the kernels are compared with it. */
void num_row_decode(const num_matrix *m, int64_t row, float *out);

#endif
