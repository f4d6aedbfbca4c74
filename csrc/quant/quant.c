#include "quant/quant.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

#include "base/map.h"
#include "base/mem.h"
#include "quant/feedback.h"
#include "quant/gptq.h"
#include "quant/rows.h"

/* A block is large enough that its write is not dwarfed by the system call, and small enough that
 * a worker's scratch stays in its second-level cache. A group is what runs between two looks at
 * the cancel flag; it does not depend on the number of threads, so neither do errors. */
enum { BLOCK_ELEMENTS = 1 << 17, GROUP_BLOCKS = 64 };

typedef struct run {
    const quant_job *job;
    enum { WRITE, TRY, LARGEST } aim;
    st_writer *w; /* WRITE */
    float largest;
    int64_t max_rows; /* TRY */
    int64_t n_rows, block_rows;
    int64_t begin, end, first_block; /* blocks cover rows begin .. end, of all rows or a range */
    int fed;                         /* with error feedback: */
    hess *h;                         /* factor for those rows, or NULL: they are encoded plainly */
    rows_sizes out;
    /* per worker: loaded rows, block_rows of each output and of zeros, what feedback needs */
    uint8_t *scratch;
    int64_t tile_rows, feedback_at, scratch_bytes;
    pthread_mutex_t lock;
    int64_t failed_block; /* lowest so far */
    err_info error;
} run;

static float row_largest(const float *x, int64_t n)
{
    float top = 0;
    for (int64_t i = 0; i < n; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    return top;
}

static err_code bad_bias(const quant_job *job, const rows_place *s, int64_t column, err_info *e)
{
    return err_set(e, ERR_UNSUPPORTED,
                   "%s: tensor %s row %lld column %lld: the group's bias cannot be kept as %s",
                   s->part->file, s->part->name, (long long)s->stored, (long long)column,
                   job->format.zero_point ? "a whole zero point" : "a float of its scale's type");
}

/* Copies keep every bit, but a float that is not finite is an error here, too. */
static err_code block_row(const run *r, int64_t row, float *x, float *largest, uint8_t *weight,
                          uint8_t *scales, uint8_t *biases, err_info *e)
{
    const quant_job *job = r->job;
    rows_place s = rows_find(job, row);
    if (job->op == QUANT_COPY) memcpy(weight, rows_codes(&s), (size_t)r->out.weight);
    if (s.part->opaque) return ERR_NONE;
    int64_t bad = rows_load(&s, x);
    if (bad < 0 && job->op != QUANT_COPY) {
        rows_transform(job, &s, x);
        if (r->aim != LARGEST) {
            bad = rows_store(job, &r->out, &s, x, weight, scales, biases);
        } else {
            float top = row_largest(x, job->cols);
            if (top > *largest) *largest = top;
            bad = rows_first_not_finite(x, job->cols);
        }
    }
    if (bad < 0) return ERR_NONE;
    return job->exact && isfinite(x[bad]) ? bad_bias(job, &s, bad, e)
                                          : rows_bad_weight(&s, bad, x[bad], e);
}

/* Rows from `row` on, of one part and n at most, that are encoded together with error feedback; 0
 * when there is none. */
static int64_t rows_together(const run *r, int64_t row, int64_t n)
{
    rows_place s = rows_find(r->job, row);
    if (!r->h || r->job->exact || rows_is_encoded(r->job, s.part)) return 0;
    int64_t left = r->job->part_rows - s.row;
    if (left > n) left = n;
    return left < GPTQ_ROWS ? left : GPTQ_ROWS;
}

static err_code feed_rows(const run *r, int64_t row, int64_t n, float *x, uint8_t *weight,
                          uint8_t *scales, uint8_t *biases, void *scratch, err_info *e)
{
    const quant_job *job = r->job;
    gptq_job g = {.h = r->h,
                  .ops = job->ops,
                  .format = &job->format,
                  .fit = job->fit,
                  .importance = rows_find(job, row).part->importance};
    for (int64_t i = 0; i < n; i++) {
        rows_place s = rows_find(job, row + i);
        int64_t bad = rows_load(&s, x + i * job->cols);
        if (bad >= 0) return rows_bad_weight(&s, bad, x[i * job->cols + bad], e);
        rows_transform(job, &s, x + i * job->cols);
    }
    int64_t bad = gptq_encode(&g, x, n, weight, scales, biases, scratch);
    if (bad < 0) return ERR_NONE;
    rows_place s = rows_find(job, row + bad / job->cols);
    return rows_bad_weight(&s, bad % job->cols, x[bad], e);
}

static err_code put_rows(const run *r, int64_t entry, int64_t row, int64_t n, int64_t row_bytes,
                         const uint8_t *data, err_info *e)
{
    if (row_bytes == 0) return ERR_NONE;
    return st_writer_put(r->w, entry, row * row_bytes, data, n * row_bytes, e);
}

/* Rows of a block begin at a multiple of 32, so their zero points fill whole words. */
static err_code put_zeros(const run *r, int64_t row, int64_t n, const uint8_t *scales,
                          const uint8_t *biases, uint8_t *words, err_info *e)
{
    const num_format *f = &r->job->format;
    int64_t n_groups = r->out.zeros, word_bytes = 4 * n_groups;
    num_zeros_pack(f, n, n_groups, scales, biases, words);
    return st_writer_put(r->w, r->job->biases, row * f->bits / 32 * word_bytes, words,
                         num_zero_words(f, n) * word_bytes, e);
}

static err_code run_block(run *r, int64_t block, int worker, err_info *e)
{
    const quant_job *job = r->job;
    int64_t row = r->begin + block * r->block_rows, n = r->end - row;
    if (n > r->block_rows) n = r->block_rows;
    uint8_t *at = r->scratch + worker * r->scratch_bytes;
    float *x = (float *)(void *)at, largest = 0;
    uint8_t *weight = at + r->tile_rows * job->cols * 4;
    uint8_t *scales = weight + r->block_rows * r->out.weight;
    uint8_t *biases = scales + r->block_rows * r->out.scales;
    for (int64_t i = 0, count; i < n; i += count) {
        uint8_t *out = weight + i * r->out.weight, *s = scales + i * r->out.scales;
        uint8_t *b = biases + i * r->out.biases;
        count = rows_together(r, row + i, n - i);
        if (count ? feed_rows(r, row + i, count, x, out, s, b, at + r->feedback_at, e)
                  : block_row(r, row + i, x, &largest, out, s, b, e))
            return e->code;
        if (!count) count = 1;
    }
    rows_each_range(job, row, n, map_forget); /* or a checkpoint would fill memory as it is read */
    if (r->aim == LARGEST) {
        pthread_mutex_lock(&r->lock);
        if (largest > r->largest) r->largest = largest;
        pthread_mutex_unlock(&r->lock);
    }
    if (r->aim != WRITE) return ERR_NONE;
    if (put_rows(r, job->weight, row, n, r->out.weight, weight, e) ||
        put_rows(r, job->scales, row, n, r->out.scales, scales, e))
        return e->code;
    if (r->out.zeros)
        return put_zeros(r, row, n, scales, biases, biases + r->block_rows * r->out.biases, e);
    return put_rows(r, job->biases, row, n, r->out.biases, biases, e);
}

static void run_blocks(void *ctx, int64_t begin, int64_t end, int worker)
{
    run *r = ctx;
    for (int64_t i = begin; i < end; i++) {
        err_info e = {0};
        int64_t block = r->first_block + i;
        if (!run_block(r, block, worker, &e)) continue;
        pthread_mutex_lock(&r->lock);
        if (block < r->failed_block) {
            r->failed_block = block;
            r->error = e;
        }
        pthread_mutex_unlock(&r->lock);
    }
}

static err_code run_range(run *r, pool *p, const cancel_flag *cancel, err_info *e)
{
    int64_t n_blocks = (r->end - r->begin + r->block_rows - 1) / r->block_rows;
    for (r->first_block = 0; r->first_block < n_blocks; r->first_block += GROUP_BLOCKS) {
        if (cancel_raised(cancel)) return err_set(e, ERR_CANCELLED, "interrupted");
        int64_t n = n_blocks - r->first_block;
        pool_for(p, n < GROUP_BLOCKS ? n : GROUP_BLOCKS, 1, run_blocks, r);
        if (r->failed_block == INT64_MAX) continue;
        if (e) *e = r->error;
        return r->error.code;
    }
    return ERR_NONE;
}

/* Factor by factor: the rows of one are encoded before the next one takes its place. */
static err_code run_fed(run *r, pool *p, const cancel_flag *cancel, err_info *e)
{
    const quant_job *job = r->job;
    hess h;
    err_code code = hess_alloc(&h, job->cols, e);
    for (int64_t row = 0; !code && row < r->n_rows; row = r->end) {
        feedback_range range = feedback_range_at(job, row);
        r->begin = row;
        r->end = range.end < r->n_rows ? range.end : r->n_rows;
        hess_state state = hess_factor(&h, &range.inputs, job->ops, p);
        r->h = state == HESS_READY ? &h : NULL;
        if (state == HESS_LOST && job->n_lost) ++*job->n_lost;
        map_forget(range.inputs.sum, (size_t)(job->cols * job->cols) * sizeof(float));
        if (r->out.zeros && row % 32)
            code = err_set(e, ERR_UNSUPPORTED, "%s: experts whose rows are no multiple of 32",
                           job->parts[0].name);
        else if (state == HESS_BROKEN)
            code = feedback_broken(job, &range, e);
        else
            code = run_range(r, p, cancel, e);
    }
    hess_free(&h);
    return code;
}

/* Rows of a block: with zero points a multiple of 32. */
static int64_t rows_per_block(const run *r)
{
    int64_t rows = BLOCK_ELEMENTS / r->job->cols, unit = r->out.zeros ? 32 : 1;
    if (rows > r->n_rows) rows = r->n_rows;
    return (rows < 1 ? unit : (rows + unit - 1) / unit * unit);
}

static void size_scratch(run *r)
{
    const quant_job *job = r->job;
    const rows_sizes *out = &r->out;
    int64_t row_bytes = out->weight + out->scales + out->biases + out->zeros;
    r->block_rows = rows_per_block(r);
    r->tile_rows = r->fed ? GPTQ_ROWS : 1;
    int64_t bytes = r->tile_rows * job->cols * 4 + r->block_rows * row_bytes;
    r->feedback_at = (bytes + 63) / 64 * 64;
    r->scratch_bytes = r->feedback_at;
    if (r->fed) r->scratch_bytes += gptq_scratch_bytes(&job->format, job->cols);
}

static err_code run_job(run *r, pool *p, const cancel_flag *cancel, err_info *e)
{
    const quant_job *job = r->job;
    if (rows_check(job, &r->n_rows, e)) return e->code;
    if (r->aim == TRY && r->n_rows > r->max_rows) r->n_rows = r->max_rows;
    r->failed_block = INT64_MAX;
    r->end = r->n_rows;
    r->fed = r->aim != LARGEST && job->op == QUANT_ENCODE && job->hessian;
    if (r->fed && feedback_check(job, e)) return e->code;
    if (r->aim != LARGEST) r->out = rows_sizes_of(job);
    size_scratch(r);
    r->scratch = mem_array((size_t)pool_n_threads(p), (size_t)r->scratch_bytes, e);
    if (!r->scratch) return e->code;
    pthread_mutex_init(&r->lock, NULL);
    err_code code = r->fed ? run_fed(r, p, cancel, e) : run_range(r, p, cancel, e);
    rows_each_range(job, 0, r->n_rows, map_forget); /* pages that two blocks share */
    pthread_mutex_destroy(&r->lock);
    mem_free(r->scratch);
    return code;
}

err_code quant_run(const quant_job *job, st_writer *w, pool *p, const cancel_flag *cancel,
                   err_info *e)
{
    run r = {.job = job, .aim = WRITE, .w = w};
    err_info own = {0};
    return run_job(&r, p, cancel, e ? e : &own);
}

err_code quant_try(const quant_job *job, int64_t max_rows, pool *p, const cancel_flag *cancel,
                   err_info *e)
{
    run r = {.job = job, .aim = TRY, .max_rows = max_rows};
    err_info own = {0};
    return run_job(&r, p, cancel, e ? e : &own);
}

err_code quant_largest(const quant_job *job, pool *p, const cancel_flag *cancel, float *largest,
                       err_info *e)
{
    run r = {.job = job, .aim = LARGEST};
    err_info own = {0};
    err_code code = run_job(&r, p, cancel, e ? e : &own);
    *largest = r.largest;
    return code;
}
