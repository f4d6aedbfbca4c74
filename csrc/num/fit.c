/* One group at a time, whatever the format: scale, codes, values, and the bytes of a row. */
#include "num/fit.h"

#include "num/fp.h"
#include "num/group.h"

err_code num_fit_check(const num_format *f, num_fit fit, err_info *e)
{
    int qstream = fit == NUM_FIT_QSTREAM || fit == NUM_FIT_QSTREAM_AMAX;
    if (!qstream || f->mode == NUM_MXFP4) return ERR_NONE;
    return err_set(e, ERR_UNSUPPORTED, "qstream's rule is for mxfp4, not %s",
                   num_mode_name(f->mode));
}

int num_any(const float *x, int64_t n)
{
    int any = 0;
    for (int64_t i = 0; i < n; i++) any |= x[i] > 0;
    return any;
}

int num_importance(const float *importance, int64_t n, float *h)
{
    if (!importance || !num_any(importance, n)) {
        for (int64_t i = 0; i < n; i++) h[i] = 1;
        return 0;
    }
    float top = num_largest(importance, n);
    int differ = 0;
    for (int64_t i = 0; i < n; i++) {
        h[i] = importance[i] / top;
        differ |= h[i] < 1;
    }
    return differ;
}

static void minmax(const num_format *f, const float *w, num_group *g)
{
    switch (f->mode) {
    case NUM_AFFINE: num_affine_minmax(f, w, g); break;
    case NUM_NVFP4: num_nvfp4_minmax(f, w, g); break;
    case NUM_FP8: num_fp8_minmax(f, w, g); break;
    default: num_mx_minmax(f, w, g);
    }
}

void num_group_fit(const num_format *f, num_fit fit, const num_fit_ops *ops, const float *w,
                   const float *importance, num_group *g)
{
    if (!ops) ops = &num_fit_plain;
    if (fit == NUM_FIT_QSTREAM || fit == NUM_FIT_QSTREAM_AMAX)
        num_qstream_fit(fit, w, importance, g);
    else if (fit == NUM_FIT_MINMAX || f->mode == NUM_FP8)
        minmax(f, w, g);
    else if (f->mode == NUM_AFFINE)
        ops->affine(f, w, importance, g);
    else
        ops->scaled(f, w, importance, g);
}

void num_group_settle(const num_format *f, num_group *g)
{
    if (f->mode != NUM_AFFINE || f->zero_point) return;
    g->code_scale = g->scale;
    g->code_bias = g->bias;
}

static void group_codes(const num_format *f, const num_group *g, const float *w, int64_t n,
                        uint8_t *codes)
{
    if (f->mode == NUM_AFFINE)
        num_affine_codes(f, g, w, n, codes);
    else if (g->qstream)
        num_qstream_codes(g, w, n, codes);
    else
        num_scaled_codes(f, g, w, n, codes);
}

uint8_t num_group_code(const num_format *f, const num_group *g, float w)
{
    uint8_t code;
    group_codes(f, g, &w, 1, &code);
    return code;
}

float num_group_value(const num_format *f, const num_group *g, uint8_t code)
{
    switch (f->mode) {
    case NUM_AFFINE: {
        float product = g->scale * code; /* rounded before the sum, as in num_row_decode */
        return product + g->bias;
    }
    case NUM_FP8:
    case NUM_MXFP8: return g->scale * fp_e4m3_decode(code);
    default: return g->scale * fp_e2m1_decode(code);
    }
}

/* n codes of 1..7 bits each, n a multiple of 8, as a little-endian bit stream. */
static void pack_codes(const uint8_t *codes, int64_t n, int bits, uint8_t *out)
{
    for (int64_t i = 0; i < n; i += 8, out += bits) {
        uint64_t word = 0;
        for (int j = 0; j < 8; j++) word |= (uint64_t)codes[i + j] << (j * bits);
        for (int j = 0; j < bits; j++) out[j] = (uint8_t)(word >> (8 * j));
    }
}

/* Group number i of a row. */
static void group_pack(const num_format *f, const num_group *g, const uint8_t *codes, int64_t i,
                       uint8_t *out, uint8_t *scales, uint8_t *biases)
{
    num_dtype scale = f->scale_dtype, bias = num_format_bias_dtype(f);
    if (f->bits == 8)
        memmove(out + i * f->group, codes, (size_t)f->group); /* fp8 has them there already */
    else
        pack_codes(codes, f->group, f->bits, out + i * (f->group / 8 * f->bits));
    if (f->mode == NUM_AFFINE)
        num_elements_encode(&g->bias, 1, bias, biases + i * num_dtype_bytes(bias));
    if (f->mode == NUM_AFFINE || f->mode == NUM_FP8)
        num_elements_encode(&g->scale, 1, scale, scales + i * num_dtype_bytes(scale));
    else
        scales[i] = g->byte;
}

void num_row_pack(const num_format *f, const num_group *groups, const uint8_t *codes, int64_t cols,
                  uint8_t *out, uint8_t *scales, uint8_t *biases)
{
    for (int64_t i = 0; i < cols / f->group; i++)
        group_pack(f, &groups[i], codes + i * f->group, i, out, scales, biases);
}

/* Below this magnitude every weight encodes. With one bit the scale is a whole range. */
static float weight_limit(const num_format *f)
{
    int range = f->bits == 1;
    if (f->mode != NUM_AFFINE || f->scale_dtype == NUM_DT_F32) return 0x1p127f;
    if (f->scale_dtype == NUM_DT_BF16) return range ? 0x1.ffp126f : 0x1p127f;
    return range ? 0x1p15f : 0x1p16f - 16;
}

static int64_t first_bad(const float *row, int64_t cols, float limit)
{
    int bad = 0;
    for (int64_t k = 0; k < cols; k++) bad |= !(fabsf(row[k]) < limit);
    if (!bad) return -1;
    int64_t k = 0;
    while (fabsf(row[k]) < limit) k++;
    return k;
}

int64_t num_fit_row(const num_format *f, num_fit fit, const num_fit_ops *ops, const float *row,
                    const float *importance, int64_t cols, uint8_t *codes, uint8_t *scales,
                    uint8_t *biases)
{
    int64_t bad = first_bad(row, cols, weight_limit(f));
    if (bad >= 0) return bad;
    for (int64_t i = 0; i < cols / f->group; i++) {
        const float *w = row + i * f->group;
        num_group g;
        uint8_t small[NUM_MAX_GROUP], *group = f->mode == NUM_FP8 ? codes : small;
        num_group_fit(f, fit, ops, w, importance ? importance + i * f->group : NULL, &g);
        group_codes(f, &g, w, f->group, group);
        group_pack(f, &g, group, i, codes, scales, biases);
    }
    return -1;
}
