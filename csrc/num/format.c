#include "num/format.h"

#include "num/fp.h"
#include "num/group.h"

num_format num_format_default(num_mode mode)
{
    num_format f = {.mode = mode, .bits = 4, .group = 64, .scale_dtype = NUM_DT_BF16};
    if (mode == NUM_MXFP4 || mode == NUM_MXFP8) f.group = 32;
    if (mode == NUM_MXFP8) f.bits = 8;
    if (mode == NUM_NVFP4) f.group = 16;
    if (mode == NUM_FP8) {
        f.bits = 8;
        f.group = 0;
    }
    return f;
}

static err_code affine_check(const num_format *f, err_info *e)
{
    if (f->bits < 1 || f->bits > 8 || f->bits == 7)
        return err_set(e, ERR_UNSUPPORTED,
                       "affine has no %d-bit codes: bits are 1, 2, 3, 4, 5, 6 or 8", f->bits);
    if (f->group != 32 && f->group != 64 && f->group != 128)
        return err_set(e, ERR_UNSUPPORTED, "affine has no groups of %lld: 32, 64 or 128",
                       (long long)f->group);
    if (f->scale_dtype == NUM_DT_U8)
        return err_set(e, ERR_UNSUPPORTED, "affine scales are f32, f16 or bf16");
    return ERR_NONE;
}

static err_code fixed_check(const num_format *f, err_info *e)
{
    num_format only = num_format_default(f->mode);
    if (f->bits != only.bits || f->group != only.group)
        return err_set(e, ERR_UNSUPPORTED, "%s is %d bits in groups of %d, not %d bits in %lld",
                       num_mode_name(f->mode), only.bits, (int)only.group, f->bits,
                       (long long)f->group);
    return ERR_NONE;
}

static err_code fp8_check(const num_format *f, int64_t cols, err_info *e)
{
    if (f->scale_dtype == NUM_DT_U8)
        return err_set(e, ERR_UNSUPPORTED, "fp8 scales are f32, f16 or bf16");
    if (f->bits == 8 && f->group == cols) return ERR_NONE;
    return err_set(e, ERR_UNSUPPORTED,
                   "fp8 is 8 bits with a scale per row of %lld, not %d bits in %lld",
                   (long long)cols, f->bits, (long long)f->group);
}

/* What belongs to one mode only. */
static err_code extras_check(const num_format *f, err_info *e)
{
    const char *name = num_mode_name(f->mode);
    if (f->mode != NUM_NVFP4 && (f->global_scale != 0 || f->least_scale))
        return err_set(e, ERR_UNSUPPORTED, "%s has no global scale", name);
    if (f->mode != NUM_AFFINE && f->zero_point)
        return err_set(e, ERR_UNSUPPORTED, "%s has no zero points", name);
    if (f->zero_point && f->bits < 2)
        return err_set(e, ERR_UNSUPPORTED, "codes of one bit have no zero points");
    if (!(f->global_scale >= 0 && f->global_scale <= 0x1p127f))
        return err_set(e, ERR_RANGE, "global scale %g is not a magnitude", (double)f->global_scale);
    if (f->least_scale > 0x7e)
        return err_set(e, ERR_RANGE, "scale byte %d is no positive E4M3", f->least_scale);
    return ERR_NONE;
}

err_code num_format_check(const num_format *f, int64_t cols, err_info *e)
{
    if (f->mode < NUM_AFFINE || f->mode >= NUM_N_MODES)
        return err_set(e, ERR_UNSUPPORTED, "moonlet does not quantize to %s",
                       num_mode_name(f->mode));
    err_code code = f->mode == NUM_AFFINE ? affine_check(f, e)
                    : f->mode == NUM_FP8  ? fp8_check(f, cols, e)
                                          : fixed_check(f, e);
    if (code || (code = extras_check(f, e))) return code;
    if (cols <= 0 || cols % f->group != 0)
        return err_set(e, ERR_RANGE, "rows of %lld weights do not split into groups of %lld",
                       (long long)cols, (long long)f->group);
    return ERR_NONE;
}

int64_t num_format_code_bytes(const num_format *f, int64_t cols)
{
    return cols * f->bits / 8;
}

static int has_float_scales(const num_format *f)
{
    return f->mode == NUM_AFFINE || f->mode == NUM_FP8;
}

num_dtype num_format_bias_dtype(const num_format *f)
{
    return f->zero_point ? NUM_DT_F32 : f->scale_dtype;
}

int64_t num_format_scale_bytes(const num_format *f, int64_t cols)
{
    return cols / f->group * (has_float_scales(f) ? num_dtype_bytes(f->scale_dtype) : 1);
}

int64_t num_format_bias_bytes(const num_format *f, int64_t cols)
{
    return f->mode == NUM_AFFINE ? cols / f->group * num_dtype_bytes(num_format_bias_dtype(f)) : 0;
}

float num_format_divisor(const num_format *f)
{
    return f->global_scale > 0 ? 2688.0f / f->global_scale : 1.0f;
}

num_matrix num_format_matrix(const num_format *f, int64_t rows, int64_t cols, const uint8_t *codes,
                             const uint8_t *scales, const uint8_t *biases)
{
    num_matrix m = {
        .mode = f->mode,
        .scale_dtype = has_float_scales(f) ? f->scale_dtype : NUM_DT_U8,
        .bias_dtype = f->mode == NUM_AFFINE ? num_format_bias_dtype(f) : NUM_DT_U8,
        .bits = f->bits,
        .rows = rows,
        .cols = cols,
        .group = f->group,
        .tile_rows = 1,
        .codes = codes,
        .scales = scales,
        .biases = biases,
        .row_bytes = num_format_code_bytes(f, cols),
        .divisor = num_format_divisor(f),
    };
    return m;
}

void num_elements_encode(const float *x, int64_t n, num_dtype dtype, uint8_t *out)
{
    if (dtype == NUM_DT_F32) {
        memcpy(out, x, (size_t)n * 4);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint16_t h = dtype == NUM_DT_F16 ? fp_f16_encode(x[i]) : fp_bf16_encode(x[i]);
        memcpy(out + 2 * i, &h, 2);
    }
}

int64_t num_zero_words(const num_format *f, int64_t rows)
{
    return (rows * f->bits + 31) / 32;
}

void num_zeros_pack(const num_format *f, int64_t rows, int64_t n_groups, const uint8_t *scales,
                    const uint8_t *biases, uint8_t *words)
{
    memset(words, 0, (size_t)(4 * num_zero_words(f, rows) * n_groups));
    for (int64_t row = 0; row < rows; row++) {
        int64_t bit = row * f->bits, word = bit / 32;
        for (int64_t g = 0; g < n_groups; g++) {
            int64_t i = row * n_groups + g;
            float scale = num_element(scales, f->scale_dtype, i);
            uint64_t zero = (uint64_t)rintf(-num_element(biases, NUM_DT_F32, i) / scale);
            zero <<= bit % 32;
            for (int b = 0; b < 8; b++)
                if (zero >> (8 * b) & 0xff)
                    words[4 * ((word + b / 4) * n_groups + g) + b % 4] |=
                        (uint8_t)(zero >> (8 * b));
        }
    }
}

int64_t num_encode_row(const num_format *f, const float *row, int64_t cols, uint8_t *codes,
                       uint8_t *scales, uint8_t *biases)
{
    return num_fit_row(f, NUM_FIT_MINMAX, NULL, row, NULL, cols, codes, scales, biases);
}
