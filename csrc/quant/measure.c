#include "quant/quant.h"

#include <math.h>

#include "base/map.h"
#include "base/mem.h"
#include "quant/rows.h"

/* Rows that one thread takes at a time, and that are measured between two looks at the cancel
 * flag. */
enum { GRAIN = 16, BATCH = 4096 };

typedef struct measure {
    const quant_job *job;
    rows_sizes out;
    int64_t first, stride; /* row i of a batch is row (first + i) * stride of the output */
    quant_loss *losses;    /* [n_rows]; an error of -1 marks a row that cannot be encoded */
    uint8_t *scratch;      /* per worker: two rows of f32, one row of each output */
    int64_t scratch_bytes;
} measure;

/* What lies between x[cols], the transformed row, and y[cols], the encoded one. A scaled row counts
 * as if the scale were undone behind it. */
static quant_loss row_loss(const rows_place *s, const float *x, const float *y, int64_t cols)
{
    const float *weights = s->part->weights;
    double rows = s->part->row_scale ? s->part->row_scale[s->row] : 1, error = 0, size = 0;
    for (int64_t i = 0; i < cols; i++) {
        double d = (double)y[i] - (double)x[i], k = weights ? weights[i] : 1;
        error += k * d * d;
        size += k * (double)x[i] * (double)x[i];
    }
    return (quant_loss){error / (rows * rows), size / (rows * rows)};
}

static void measure_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    const measure *m = ctx;
    const quant_job *job = m->job;
    uint8_t *at = m->scratch + worker * m->scratch_bytes;
    float *x = (float *)(void *)at, *y = x + job->cols;
    uint8_t *weight = (uint8_t *)(y + job->cols), *scales = weight + m->out.weight;
    uint8_t *biases = scales + m->out.scales;
    for (int64_t i = m->first + begin; i < m->first + end; i++) {
        rows_place s = rows_find(job, i * m->stride);
        m->losses[i].error = -1;
        if (rows_load(&s, x) >= 0) continue;
        rows_transform(job, &s, x);
        if (rows_store(job, &m->out, &s, x, weight, scales, biases) >= 0) continue;
        num_matrix row = num_format_matrix(&job->format, 1, job->cols, weight, scales, biases);
        num_row_decode(&row, 0, y);
        m->losses[i] = row_loss(&s, x, y, job->cols);
    }
}

/* What is wrong with a row that could not be measured. */
static err_code bad_row(const measure *m, int64_t row, err_info *e)
{
    const quant_job *job = m->job;
    float *x = (float *)(void *)m->scratch;
    uint8_t *weight = (uint8_t *)(x + 2 * job->cols), *scales = weight + m->out.weight;
    rows_place s = rows_find(job, row);
    int64_t bad = rows_load(&s, x);
    if (bad < 0) {
        rows_transform(job, &s, x);
        bad = rows_store(job, &m->out, &s, x, weight, scales, scales + m->out.scales);
    }
    return bad < 0 ? ERR_NONE : rows_bad_weight(&s, bad, x[bad], e);
}

/* Measures every row and adds them up, part by part, in their order. */
static err_code measure_all(measure *m, int64_t n_rows, quant_loss *losses, pool *p,
                            const cancel_flag *cancel, err_info *e)
{
    for (; m->first < n_rows; m->first += BATCH) {
        if (cancel_raised(cancel)) return err_set(e, ERR_CANCELLED, "interrupted");
        int64_t n = n_rows - m->first < BATCH ? n_rows - m->first : BATCH;
        pool_for(p, n, GRAIN, measure_rows, m);
        rows_each_range(m->job, m->first * m->stride, (n - 1) * m->stride + 1, map_forget);
    }
    for (int64_t i = 0; i < n_rows; i++) {
        if (m->losses[i].error < 0) return bad_row(m, i * m->stride, e);
        quant_loss *loss = &losses[i * m->stride / m->job->part_rows];
        loss->error += m->losses[i].error;
        loss->size += m->losses[i].size;
    }
    return ERR_NONE;
}

err_code quant_damage(const quant_job *job, int64_t max_rows, pool *p, const cancel_flag *cancel,
                      quant_loss *losses, err_info *e)
{
    err_info own = {0};
    int64_t n_rows;
    if (!e) e = &own;
    if (rows_check(job, &n_rows, e)) return e->code;
    if (job->op != QUANT_ENCODE)
        return err_set(e, ERR_RANGE, "%s: tensor %s is not encoded", job->parts[0].file,
                       job->parts[0].name);
    measure m = {.job = job, .out = rows_sizes_of(job)};
    m.stride = (n_rows - 1) / max_rows + 1;
    n_rows = (n_rows + m.stride - 1) / m.stride;
    m.scratch_bytes = (job->cols * 8 + m.out.weight + m.out.scales + m.out.biases + 63) / 64 * 64;
    m.losses = mem_array((size_t)n_rows, sizeof *m.losses, e);
    m.scratch = mem_array((size_t)pool_n_threads(p), (size_t)m.scratch_bytes, e);
    for (int64_t i = 0; i < job->n_parts; i++) losses[i] = (quant_loss){0};
    err_code code = ERR_MEMORY;
    if (m.losses && m.scratch) code = measure_all(&m, n_rows, losses, p, cancel, e);
    mem_free(m.losses);
    mem_free(m.scratch);
    return code;
}

err_code quant_values(const quant_job *job, float *out, err_info *e)
{
    err_info own = {0};
    int64_t n_rows;
    if (!e) e = &own;
    if (rows_check(job, &n_rows, e)) return e->code;
    for (int64_t i = 0; i < n_rows; i++, out += job->cols) {
        rows_place s = rows_find(job, i);
        int64_t bad = rows_load(&s, out);
        if (bad >= 0) return rows_bad_weight(&s, bad, out[bad], e);
        rows_transform(job, &s, out);
    }
    return ERR_NONE;
}
