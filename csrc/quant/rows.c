#include "quant/rows.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "num/fp.h"

rows_sizes rows_sizes_of(const quant_job *job)
{
    rows_sizes s = {0};
    switch (job->op) {
    case QUANT_COPY: s.weight = job->parts[0].matrix.row_bytes; break;
    case QUANT_BF16: s.weight = job->cols * 2; break;
    case QUANT_F32: s.weight = job->cols * 4; break;
    case QUANT_ENCODE:
        s.weight = num_format_code_bytes(&job->format, job->cols);
        s.scales = num_format_scale_bytes(&job->format, job->cols);
        s.biases = num_format_bias_bytes(&job->format, job->cols);
        if (job->format.zero_point) s.zeros = job->cols / job->format.group;
        break;
    }
    return s;
}

rows_place rows_find(const quant_job *job, int64_t row)
{
    rows_place s = {.part = &job->parts[row / job->part_rows], .row = row % job->part_rows};
    s.stored = s.part->first_row + s.row;
    return s;
}

const uint8_t *rows_codes(const rows_place *s)
{
    return s->part->matrix.codes + s->stored * s->part->matrix.row_bytes;
}

int64_t rows_first_not_finite(const float *x, int64_t n)
{
    int any = 0;
    for (int64_t i = 0; i < n; i++) any |= !(fabsf(x[i]) <= FLT_MAX); /* without a branch */
    for (int64_t i = 0; i < n && any; i++)
        if (!isfinite(x[i])) return i;
    return -1;
}

int64_t rows_load(const rows_place *s, float *out)
{
    const num_matrix *m = &s->part->matrix;
    const uint8_t *data = rows_codes(s);
    if (m->mode == NUM_BF16)
        for (int64_t i = 0; i < m->cols; i++) {
            uint16_t h;
            memcpy(&h, data + 2 * i, 2);
            out[i] = fp_bf16_decode(h);
        }
    else
        num_row_decode(m, s->stored, out);
    return rows_first_not_finite(out, m->cols);
}

/* The first column that bf16 cannot hold, or -1. */
static int64_t store_bf16(const float *x, int64_t n, uint8_t *out)
{
    for (int64_t i = 0; i < n; i++) {
        uint16_t h = fp_bf16_encode(x[i]);
        if ((h & 0x7f80) == 0x7f80) return i;
        memcpy(out + 2 * i, &h, 2);
    }
    return -1;
}

void rows_transform(const quant_job *job, const rows_place *s, float *x)
{
    const quant_part *part = s->part;
    float rows = part->row_scale ? part->row_scale[s->row] : 1.0f;
    if (job->add != 0.0f)
        for (int64_t i = 0; i < job->cols; i++) x[i] += job->add;
    if (rows != 1.0f)
        for (int64_t i = 0; i < job->cols; i++) x[i] *= rows;
    if (part->col_scale)
        for (int64_t i = 0; i < job->cols; i++) x[i] *= part->col_scale[i];
    if (job->subtract != 0.0f)
        for (int64_t i = 0; i < job->cols; i++) x[i] -= job->subtract;
}

static int is_changed(const quant_job *job, const quant_part *part)
{
    return part->col_scale || part->row_scale || job->add != 0.0f || job->subtract != 0.0f;
}

/* Are the part's codes and scales those that are to be written? */
static int same_codes(const quant_job *job, const quant_part *part)
{
    const num_matrix *m = &part->matrix;
    num_matrix like = num_format_matrix(&job->format, m->rows, m->cols, NULL, NULL, NULL);
    if (m->mode != like.mode || m->bits != like.bits || m->group != like.group ||
        m->row_bytes != like.row_bytes || is_changed(job, part))
        return 0;
    if (m->mode == NUM_AFFINE) return m->scale_dtype == like.scale_dtype;
    return m->mode != NUM_FP8 || (m->scale_dtype == like.scale_dtype && m->tile_rows == 1);
}

int rows_is_encoded(const quant_job *job, const quant_part *part)
{
    const num_matrix *m = &part->matrix;
    num_matrix like = num_format_matrix(&job->format, m->rows, m->cols, NULL, NULL, NULL);
    if (!same_codes(job, part)) return 0;
    if (m->mode == NUM_AFFINE) return m->bias_dtype == like.bias_dtype;
    return m->mode != NUM_NVFP4 || m->divisor == like.divisor;
}

/* The bias as `like` stores it; 0 if that is not the same bias. */
static int take_bias(const num_matrix *like, int zero_point, float scale, float bias, uint8_t *out)
{
    if (zero_point) {
        float zero = -bias / scale;
        if (!(zero >= 0 && zero < (float)(1 << like->bits)) || zero != rintf(zero) ||
            -(scale * zero) != bias)
            return 0;
    }
    num_elements_encode(&bias, 1, like->bias_dtype, out);
    return num_element(out, like->bias_dtype, 0) == bias;
}

/* The first column of a group whose bias cannot be written, or -1. */
static int64_t take_encoded(const num_format *f, const rows_sizes *out, const rows_place *s,
                            uint8_t *weight, uint8_t *scales, uint8_t *biases)
{
    const num_matrix *m = &s->part->matrix;
    memcpy(weight, rows_codes(s), (size_t)out->weight);
    memcpy(scales, m->scales + s->stored * out->scales, (size_t)out->scales);
    if (m->mode != NUM_AFFINE) return -1;
    num_matrix like = num_format_matrix(f, m->rows, m->cols, NULL, NULL, NULL);
    int64_t n = m->cols / m->group, bytes = num_dtype_bytes(like.bias_dtype);
    for (int64_t g = 0; g < n; g++) {
        float scale = num_element(m->scales, m->scale_dtype, s->stored * n + g);
        float bias = num_element(m->biases, m->bias_dtype, s->stored * n + g);
        if (!take_bias(&like, f->zero_point, scale, bias, biases + g * bytes)) return g * m->group;
    }
    return -1;
}

int64_t rows_store(const quant_job *job, const rows_sizes *out, const rows_place *s, const float *x,
                   uint8_t *weight, uint8_t *scales, uint8_t *biases)
{
    if (job->op == QUANT_BF16) return store_bf16(x, job->cols, weight);
    if (job->op == QUANT_ENCODE) {
        if (job->exact || rows_is_encoded(job, s->part))
            return take_encoded(&job->format, out, s, weight, scales, biases);
        return num_fit_row(&job->format, job->fit, job->ops->fit, x, s->part->importance, job->cols,
                           weight, scales, biases);
    }
    memcpy(weight, x, (size_t)job->cols * 4);
    return rows_first_not_finite(x, job->cols);
}

err_code rows_bad_weight(const rows_place *s, int64_t column, float x, err_info *e)
{
    return err_set(e, ERR_FORMAT, "%s: tensor %s row %lld column %lld: %g cannot be written%s",
                   s->part->file, s->part->name, (long long)s->stored, (long long)column, (double)x,
                   isfinite(x) ? ": it is too large for the format" : "");
}

void rows_each_range(const quant_job *job, int64_t row, int64_t n,
                     void (*fn)(const void *data, size_t n_bytes))
{
    while (n > 0) {
        rows_place s = rows_find(job, row);
        int64_t left = job->part_rows - s.row;
        if (left > n) left = n;
        fn(rows_codes(&s), (size_t)(left * s.part->matrix.row_bytes));
        row += left;
        n -= left;
    }
}

static err_code check_part(const quant_job *job, const quant_part *part, err_info *e)
{
    const num_matrix *m = &part->matrix, *other = &job->parts[0].matrix;
    int64_t first = part->first_row;
    if (m->cols != job->cols || first < 0 || first > m->rows || job->part_rows > m->rows - first)
        return err_set(e, ERR_RANGE, "%s: tensor %s has no %lld rows of %lld from row %lld on",
                       part->file, part->name, (long long)job->part_rows, (long long)job->cols,
                       (long long)first);
    if (job->op != QUANT_COPY && part->opaque)
        return err_set(e, ERR_UNSUPPORTED, "%s: tensor %s is not BF16, F16 or F32", part->file,
                       part->name);
    if (job->exact && !same_codes(job, part))
        return err_set(e, ERR_UNSUPPORTED,
                       "%s: tensor %s is stored otherwise than it was to be kept", part->file,
                       part->name);
    if (job->op != QUANT_COPY) return ERR_NONE;
    if (is_changed(job, part))
        return err_set(e, ERR_RANGE, "%s: tensor %s: a copy has no scales", part->file, part->name);
    if (m->mode > NUM_BF16 || m->mode != other->mode || m->row_bytes != other->row_bytes)
        return err_set(e, ERR_RANGE,
                       "%s: tensor %s is stored otherwise than other parts, or packed", part->file,
                       part->name);
    return ERR_NONE;
}

err_code rows_check(const quant_job *job, int64_t *n_rows, err_info *e)
{
    if (job->n_parts < 1 || job->part_rows < 1 || job->cols < 1 ||
        __builtin_mul_overflow(job->n_parts, job->part_rows, n_rows))
        return err_set(e, ERR_RANGE, "a tensor of %lld parts of %lld rows of %lld",
                       (long long)job->n_parts, (long long)job->part_rows, (long long)job->cols);
    for (int64_t i = 0; i < job->n_parts; i++)
        if (check_part(job, &job->parts[i], e)) return e->code;
    return ERR_NONE;
}
