#include "quant/feedback.h"

#include <stdio.h>
#include <string.h>

static int64_t count_matrices(const quant_hessian *h)
{
    return h->sums->n_dims == 3 ? h->sums->shape[0] : 1;
}

int64_t feedback_side(const quant_job *job)
{
    const st_tensor *t = job->hessian->sums;
    return t->shape[t->n_dims - 1];
}

int64_t feedback_blocks(const quant_job *job)
{
    return job->cols / feedback_side(job);
}

static int64_t count_rows(const quant_job *job)
{
    return job->n_parts * job->part_rows;
}

/* "256 x 256", "16 x 64 x 64" */
static void shape_text(const st_tensor *t, char *out, size_t room)
{
    int at = 0;
    out[0] = 0;
    for (int i = 0; i < t->n_dims && at < (int)room; i++)
        at += snprintf(out + at, room - (size_t)at, i ? " x %lld" : "%lld", (long long)t->shape[i]);
}

err_code feedback_check(const quant_job *job, err_info *e)
{
    const quant_hessian *h = job->hessian;
    const st_tensor *t = h->sums, *c = h->counts;
    const int64_t *side = t->shape + t->n_dims - 2;
    int64_t n = count_matrices(h), blocks = 1;
    char shape[128];
    shape_text(t, shape, sizeof shape);
    if (t->n_dims == 3 && h->expert < 0 && n > 0 && job->cols % n == 0 && side[1] == job->cols / n)
        blocks = n;
    if (t->dtype != ST_F32 || t->n_dims < 2 || t->n_dims > 3 || side[0] != job->cols / blocks ||
        side[1] != job->cols / blocks)
        return err_set(e, ERR_RANGE,
                       "%s: tensor %s is %s %s; %s has rows of %lld, which need F32 %lld x %lld",
                       t->file, t->name, st_dtype_name(t->dtype), shape, job->parts[0].name,
                       (long long)job->cols, (long long)job->cols, (long long)job->cols);
    if (side[1] % KERN_ROWS)
        return err_set(e, ERR_UNSUPPORTED,
                       "%s: error feedback takes rows of a multiple of %d, not of %lld",
                       job->parts[0].name, KERN_ROWS, (long long)side[1]);
    if (blocks > 1 && side[1] % job->format.group)
        return err_set(e, ERR_UNSUPPORTED,
                       "%s: tensor %s has blocks of %lld, which cut groups of %s", t->file, t->name,
                       (long long)side[1], job->parts[0].name);
    if (n < 1 || h->expert >= n || (h->expert < 0 && blocks == 1 && count_rows(job) % n != 0))
        return err_set(e, ERR_RANGE, "%s: tensor %s has matrices of %lld experts; %s has others",
                       t->file, t->name, (long long)n, job->parts[0].name);
    if (c->dtype != ST_I64 || st_elements(c) != n)
        return err_set(e, ERR_RANGE, "%s: tensor %s is not I64 [%lld]", c->file, c->name,
                       (long long)n);
    return ERR_NONE;
}

/* The rows that one matrix is for: all where the job names it. */
static int64_t rows_each(const quant_job *job)
{
    const quant_hessian *h = job->hessian;
    if (h->expert >= 0 || feedback_blocks(job) > 1) return count_rows(job);
    return count_rows(job) / count_matrices(h);
}

static int same_scale(const quant_job *job, const float *a, const float *b)
{
    if (!a || !b) return a == b;
    return a == b || memcmp(a, b, (size_t)job->cols * sizeof *a) == 0;
}

feedback_range feedback_range_at(const quant_job *job, int64_t begin)
{
    const quant_hessian *h = job->hessian;
    int64_t nth = begin / rows_each(job), part = begin / job->part_rows;
    feedback_range r = {.begin = begin,
                        .end = (nth + 1) * rows_each(job),
                        .matrix = h->expert >= 0 ? h->expert : nth,
                        .col_scale = job->parts[part].col_scale};
    while (++part < job->n_parts && part * job->part_rows < r.end)
        if (!same_scale(job, job->parts[part].col_scale, r.col_scale))
            r.end = part * job->part_rows;
    return r;
}

hess_inputs feedback_inputs(const quant_job *job, const feedback_range *range, int64_t block)
{
    const quant_hessian *h = job->hessian;
    int64_t side = feedback_side(job), matrix = range->matrix + block, count;
    memcpy(&count, h->counts->data + matrix * (int64_t)sizeof count, sizeof count);
    return (hess_inputs){
        .sum = h->sums->data + matrix * side * side * (int64_t)sizeof(float),
        .count = (double)count,
        .col_scale = range->col_scale ? range->col_scale + block * side : NULL,
    };
}

err_code feedback_broken(const quant_job *job, const feedback_range *range, int64_t block,
                         err_info *e)
{
    const st_tensor *t = job->hessian->sums;
    return err_set(e, ERR_FORMAT, "%s: tensor %s, matrix %lld: numbers that no inputs give",
                   t->file, t->name, (long long)(range->matrix + block));
}
