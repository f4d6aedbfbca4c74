#include "num/matrix.h"

#include "num/fp.h"

const char *num_mode_name(num_mode mode)
{
    static const char *const names[NUM_N_MODES] = {"f32",   "f16",   "bf16",  "affine",
                                                   "mxfp4", "mxfp8", "nvfp4", "fp8"};
    return (unsigned)mode < NUM_N_MODES ? names[mode] : "?";
}

int num_mode_parse(const char *name, num_mode *mode)
{
    for (int i = 0; i < NUM_N_MODES; i++) {
        if (strcmp(num_mode_name((num_mode)i), name) != 0) continue;
        *mode = (num_mode)i;
        return 1;
    }
    return 0;
}

int num_dtype_bytes(num_dtype dtype)
{
    static const int bytes[] = {
        [NUM_DT_F32] = 4, [NUM_DT_F16] = 2, [NUM_DT_BF16] = 2, [NUM_DT_U8] = 1};
    return bytes[dtype];
}

int64_t num_matrix_bytes(const num_matrix *m)
{
    int64_t bytes = m->rows * m->row_bytes;
    if (m->mode <= NUM_BF16) return bytes;
    int64_t tile_rows = m->mode == NUM_FP8 ? m->tile_rows : 1;
    int64_t per_column = (m->rows + tile_rows - 1) / tile_rows;
    int64_t n_scales = per_column * ((m->cols + m->group - 1) / m->group);
    switch (m->mode) {
    case NUM_AFFINE:
        bytes += n_scales * num_dtype_bytes(m->bias_dtype);
        return bytes + n_scales * num_dtype_bytes(m->scale_dtype);
    case NUM_FP8: return bytes + n_scales * num_dtype_bytes(m->scale_dtype);
    default: return bytes + n_scales;
    }
}

float num_element(const uint8_t *data, num_dtype dtype, int64_t i)
{
    uint32_t u32;
    uint16_t u16;
    if (dtype == NUM_DT_F32) {
        memcpy(&u32, data + 4 * i, 4);
        return fp_from_bits(u32);
    }
    memcpy(&u16, data + 2 * i, 2);
    return dtype == NUM_DT_F16 ? fp_f16_decode(u16) : fp_bf16_decode(u16);
}

void num_elements_decode(const uint8_t *data, num_dtype dtype, int64_t first, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++) out[i] = num_element(data, dtype, first + i);
}

/* Code k of a row of packed codes, 1..8 bits each; reads no byte beyond the one it ends in. */
static uint8_t code_at(const uint8_t *row, int bits, int64_t k)
{
    int64_t at = k * bits >> 3;
    int shift = (int)(k * bits & 7);
    unsigned window = row[at];
    if (shift + bits > 8) window |= (unsigned)row[at + 1] << 8;
    return (uint8_t)(window >> shift & ((1u << bits) - 1));
}

/* What one scale of a mode that is not affine stands for. */
static float scale_value(const num_matrix *m, int64_t i)
{
    switch (m->mode) {
    case NUM_MXFP4:
    case NUM_MXFP8: return fp_e8m0_decode(m->scales[i]);
    case NUM_NVFP4: return fp_e4m3_decode(m->scales[i]) / m->divisor;
    default: return num_element(m->scales, m->scale_dtype, i);
    }
}

static void affine_row(const num_matrix *m, int64_t row, float *out)
{
    const uint8_t *codes = m->codes + row * m->row_bytes;
    int64_t first = row * (m->cols / m->group);
    for (int64_t k = 0; k < m->cols; k++) {
        int64_t g = first + k / m->group;
        float product = num_element(m->scales, m->scale_dtype, g) * code_at(codes, m->bits, k);
        out[k] = product + num_element(m->biases, m->bias_dtype, g);
    }
}

static void scaled_row(const num_matrix *m, int64_t row, float *out)
{
    const uint8_t *codes = m->codes + row * m->row_bytes;
    int64_t tile_rows = m->mode == NUM_FP8 ? m->tile_rows : 1;
    int64_t first = row / tile_rows * ((m->cols + m->group - 1) / m->group);
    int four_bits = m->mode == NUM_MXFP4 || m->mode == NUM_NVFP4;
    for (int64_t k = 0; k < m->cols; k++) {
        float value = four_bits ? fp_e2m1_decode(code_at(codes, 4, k)) : fp_e4m3_decode(codes[k]);
        out[k] = scale_value(m, first + k / m->group) * value;
    }
}

void num_row_decode(const num_matrix *m, int64_t row, float *out)
{
    static const num_dtype element[] = {
        [NUM_F32] = NUM_DT_F32, [NUM_F16] = NUM_DT_F16, [NUM_BF16] = NUM_DT_BF16};
    if (m->mode == NUM_AFFINE) {
        affine_row(m, row, out);
    } else if (m->mode > NUM_AFFINE) {
        scaled_row(m, row, out);
    } else {
        num_elements_decode(m->codes + row * m->row_bytes, element[m->mode], 0, m->cols, out);
    }
}
