/* format: from float weights to the bytes of a checkpoint, one row at a time.
 *
 * Bit-exact with MLX (mlx/backend/{cpu,metal}, checked against 0.32.4 and 0.32.1). The two
 * back ends disagree in places, so a format names whose arithmetic it follows:
 *
 *              rounding          affine group without     E2M1 ties, zeros    MX scale of a
 *                                a positive value                            zero group
 *   metal      half away from 0  maximum taken as 0       to even, keeps -0   2^-127
 *   cpu        half to even      its true maximum         to smaller, no -0   1
 *
 * Published checkpoints were made with metal. The cpu flavour departs from MLX where that would
 * lose weights: its MX scale byte wraps for groups of denormals, here it stops at 0; and it takes
 * the maxima of F16 weights to an MX exponent in F16, here in F32.
 *
 * What MLX does not have is the same in both: integer zero points, the rule of which is
 * compressed-tensors' (utils/helpers.py, calculate_qparams), and fp8 with a scale per row, its
 * maximum / 448. Pure: no allocation, no I/O; any thread. */
#ifndef NUM_FORMAT_H
#define NUM_FORMAT_H

#include "base/err.h"
#include "num/matrix.h"

typedef enum num_flavour { NUM_METAL, NUM_CPU } num_flavour;

/* Exponent of an MX scale: the smallest that avoids clipping (MLX 0.32.2 and later), or the one
 * nearest to log2(max / largest code), which clips the maximum of about half of all groups. */
typedef enum num_mx_rule { NUM_MX_CEIL, NUM_MX_NEAREST } num_mx_rule;

/* What an affine bias may be: any float, minus the scale times a code, or minus the scale times
 * 2^(bits - 1), the middle of the codes. The latter two are kept as f32. */
typedef enum num_zero_point { NUM_ZP_FREE, NUM_ZP_INTEGER, NUM_ZP_SYMMETRIC } num_zero_point;

typedef struct num_format {
    num_mode mode; /* affine, mxfp4, mxfp8, nvfp4 or fp8 */
    int bits;
    int64_t group; /* fp8: all columns, one scale per row */
    num_dtype
        scale_dtype; /* affine: of scales and biases; MLX takes the type of the weights. fp8 */
    num_zero_point zero_point; /* affine */
    num_flavour flavour;
    num_mx_rule mx_rule;
    float global_scale;  /* nvfp4: max|W| of the tensor, or 0 for none */
    uint8_t least_scale; /* nvfp4: scale byte in the place of 0 */
} num_format;

/* bits and group as MLX chooses them (affine 4/64, mxfp4 4/32, mxfp8 8/32, nvfp4 4/16; fp8 8/0,
 * which the caller makes the row), BF16 scales, metal, ceil, no global scale. */
num_format num_format_default(num_mode mode);

/* ERR_UNSUPPORTED when MLX has no such mode, bits and group; ERR_RANGE when rows of `cols`
 * weights do not split into such groups, or for an impossible global scale. */
err_code num_format_check(const num_format *f, int64_t cols, err_info *e);

/* Bytes per row of the three arrays; `cols` as checked. Biases are 0 unless affine. */
int64_t num_format_code_bytes(const num_format *f, int64_t cols);
int64_t num_format_scale_bytes(const num_format *f, int64_t cols);
int64_t num_format_bias_bytes(const num_format *f, int64_t cols);

/* The matrix that num_encode_row wrote, for decoding: borrows the three arrays. */
num_matrix num_format_matrix(const num_format *f, int64_t rows, int64_t cols, const uint8_t *codes,
                             const uint8_t *scales, const uint8_t *biases);

/* One row: row[cols] into codes, scales and biases of the sizes above, at any alignment (biases
 * is not touched unless affine). The format must have passed num_format_check.
 * Returns -1, or, having written nothing, the first column whose weight has no encoding: NaN,
 * infinity, 2^127 and above (the range of a group would overflow), and what
 * makes scales of F16, or of BF16 with one bit, overflow. */
int64_t num_encode_row(const num_format *f, const float *row, int64_t cols, uint8_t *codes,
                       uint8_t *scales, uint8_t *biases);

/* Zero points as compressed-tensors packs them: down the rows, which is why rows is a multiple of
 * 32 except at the end of a matrix. scales and biases are those of num_encode_row under zero_point,
 * [rows][n_groups]; words: [num_zero_words(f, rows)][n_groups] u32, little-endian. */
int64_t num_zero_words(const num_format *f, int64_t rows);
void num_zeros_pack(const num_format *f, int64_t rows, int64_t n_groups, const uint8_t *scales,
                    const uint8_t *biases, uint8_t *words);

/* n floats as f32, f16 or bf16 at any alignment, rounded to nearest even. */
void num_elements_encode(const float *x, int64_t n, num_dtype dtype, uint8_t *out);

#endif
