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

typedef struct fed_block {
    hess h;
    int is_ready; /* or its columns are encoded plainly */
} fed_block;

typedef struct run {
    const quant_job *job;
    enum { WRITE, TRY, LARGEST } aim;
    st_writer *w; /* WRITE */
    float largest;
    int64_t max_rows; /* TRY */
    int64_t n_rows, block_rows;
    int64_t begin, end, first_block; /* blocks cover rows begin .. end, of all rows or a range */
    int fed;                         /* with error feedback: */
    fed_block *blocks;               /* [n_blocks] of the columns, for those rows */
    int64_t n_blocks;
    int n_ready; /* 0: they are encoded plainly */
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
    if (!r->n_ready || r->job->exact || rows_is_encoded(r->job, s.part)) return 0;
    int64_t left = r->job->part_rows - s.row;
    if (left > n) left = n;
    return left < GPTQ_ROWS ? left : GPTQ_ROWS;
}

/* Encoded rows, one after the other. */
typedef struct arrays {
    uint8_t *weight, *scales, *biases;
} arrays;

static rows_sizes block_sizes(const num_format *f, int64_t side)
{
    return (rows_sizes){.weight = num_format_code_bytes(f, side),
                        .scales = num_format_scale_bytes(f, side),
                        .biases = num_format_bias_bytes(f, side)};
}

/* Bytes that feed_rows needs at a 64-byte boundary: for gptq_encode, and the rows of a block. */
static int64_t feed_scratch_bytes(const quant_job *job)
{
    int64_t side = feedback_side(job);
    rows_sizes size = block_sizes(&job->format, side);
    return gptq_scratch_bytes(&job->format, side) +
           GPTQ_ROWS * (side * 4 + size.weight + size.scales + size.biases);
}

/* One block of n rows into `to`, with feedback if there is any to go by; the first weight that
 * cannot be encoded, or -1. */
static int64_t encode_block(const run *r, const fed_block *f, const float *importance,
                            const float *rows, int64_t n, arrays to, void *scratch)
{
    const quant_job *job = r->job;
    int64_t side = f->h.n;
    rows_sizes size = block_sizes(&job->format, side);
    gptq_job g = {&f->h, job->ops, &job->format, job->fit, importance};
    if (f->is_ready) return gptq_encode(&g, rows, n, to.weight, to.scales, to.biases, scratch);
    for (int64_t i = 0; i < n; i++) {
        int64_t bad = num_fit_row(&job->format, job->fit, job->ops->fit, rows + i * side,
                                  importance, side, to.weight + i * size.weight,
                                  to.scales + i * size.scales, to.biases + i * size.biases);
        if (bad >= 0) return i * side + bad;
    }
    return -1;
}

static void copy_block(uint8_t *to, int64_t row_bytes, int64_t block, const uint8_t *from,
                       int64_t bytes, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        memcpy(to + i * row_bytes + block * bytes, from + i * bytes, (size_t)bytes);
}

/* The columns of a block, of n transformed rows x[n][cols]; the first weight of x that cannot be
 * encoded, or -1. */
static int64_t feed_block(const run *r, int64_t block, const float *importance, const float *x,
                          int64_t n, arrays to, uint8_t *scratch)
{
    const fed_block *f = &r->blocks[block];
    int64_t side = f->h.n, cols = r->job->cols, first = block * side;
    rows_sizes size = block_sizes(&r->job->format, side);
    float *rows = (float *)(void *)(scratch + gptq_scratch_bytes(&r->job->format, side));
    arrays own = {.weight = (uint8_t *)(rows + GPTQ_ROWS * side)};
    own.scales = own.weight + GPTQ_ROWS * size.weight;
    own.biases = own.scales + GPTQ_ROWS * size.scales;
    for (int64_t i = 0; i < n; i++)
        memcpy(rows + i * side, x + i * cols + first, (size_t)side * sizeof *rows);
    int64_t bad = encode_block(r, f, importance ? importance + first : NULL, rows, n, own, scratch);
    if (bad >= 0) return bad / side * cols + first + bad % side;
    copy_block(to.weight, r->out.weight, block, own.weight, size.weight, n);
    copy_block(to.scales, r->out.scales, block, own.scales, size.scales, n);
    copy_block(to.biases, r->out.biases, block, own.biases, size.biases, n);
    return -1;
}

static err_code feed_rows(const run *r, int64_t row, int64_t n, float *x, arrays to,
                          uint8_t *scratch, err_info *e)
{
    const quant_job *job = r->job;
    const float *importance = rows_find(job, row).part->importance;
    for (int64_t i = 0; i < n; i++) {
        rows_place s = rows_find(job, row + i);
        int64_t bad = rows_load(&s, x + i * job->cols);
        if (bad >= 0) return rows_bad_weight(&s, bad, x[i * job->cols + bad], e);
        rows_transform(job, &s, x + i * job->cols);
    }
    int64_t bad = -1;
    for (int64_t i = 0; i < r->n_blocks && bad < 0; i++)
        bad = feed_block(r, i, importance, x, n, to, scratch);
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
        arrays to = {weight + i * r->out.weight, scales + i * r->out.scales,
                     biases + i * r->out.biases};
        count = rows_together(r, row + i, n - i);
        if (count ? feed_rows(r, row + i, count, x, to, at + r->feedback_at, e)
                  : block_row(r, row + i, x, &largest, to.weight, to.scales, to.biases, e))
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

static err_code factor_blocks(run *r, const feedback_range *range, pool *p, err_info *e)
{
    const quant_job *job = r->job;
    r->n_ready = 0;
    for (int64_t i = 0; i < r->n_blocks; i++) {
        fed_block *f = &r->blocks[i];
        hess_inputs inputs = feedback_inputs(job, range, i);
        hess_state state = hess_factor(&f->h, &inputs, job->ops, p);
        map_forget(inputs.sum, (size_t)(f->h.n * f->h.n) * sizeof(float));
        if (state == HESS_BROKEN) return feedback_broken(job, range, i, e);
        if (state == HESS_LOST && job->n_lost) ++*job->n_lost;
        f->is_ready = state == HESS_READY;
        r->n_ready += f->is_ready;
    }
    return ERR_NONE;
}

/* The rows of a range are encoded before the factors of the next one take their place. */
static err_code run_ranges(run *r, pool *p, const cancel_flag *cancel, err_info *e)
{
    const quant_job *job = r->job;
    for (int64_t row = 0; row < r->n_rows; row = r->end) {
        feedback_range range = feedback_range_at(job, row);
        r->begin = row;
        r->end = range.end < r->n_rows ? range.end : r->n_rows;
        if (r->out.zeros && row % 32)
            return err_set(e, ERR_UNSUPPORTED, "%s: experts whose rows are no multiple of 32",
                           job->parts[0].name);
        if (factor_blocks(r, &range, p, e) || run_range(r, p, cancel, e)) return e->code;
    }
    return ERR_NONE;
}

static err_code run_fed(run *r, pool *p, const cancel_flag *cancel, err_info *e)
{
    r->n_blocks = feedback_blocks(r->job);
    r->blocks = mem_array((size_t)r->n_blocks, sizeof *r->blocks, e);
    err_code code = r->blocks ? ERR_NONE : ERR_MEMORY;
    for (int64_t i = 0; !code && i < r->n_blocks; i++)
        code = hess_alloc(&r->blocks[i].h, feedback_side(r->job), e);
    if (!code) code = run_ranges(r, p, cancel, e);
    for (int64_t i = 0; r->blocks && i < r->n_blocks; i++) hess_free(&r->blocks[i].h);
    mem_free(r->blocks);
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
    if (r->fed) r->scratch_bytes += (feed_scratch_bytes(job) + 63) / 64 * 64;
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
