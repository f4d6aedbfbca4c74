/* y = x W^T over the pool: rows in blocks, a block decoded once for all tokens. */
#include <stddef.h>
#include <string.h>

#include "base/pool.h"
#include "kern/bf16.h"
#include "kern/int8.h"
#include "kern/kern_const.h"

/* A block of decoded rows takes a quarter of a megabyte, so that it and the tokens it meets stay
 * in L2; it is also work enough (some microseconds) to be worth handing to a thread. */
enum { BLOCK_FLOATS = 64 * 1024, BLOCK_MAX_ROWS = 64, ITEMS_PER_THREAD = 64, FEW = 4 };

typedef struct work {
    const kern_ops *ops;
    const kern_job *jobs;
    int64_t n_jobs;
    char *scratch;
    int64_t scratch_bytes;
    char *rows; /* of the jobs' x, rounded; NULL in f32 */
} work;

static int runs_int8(const work *p, const num_matrix *w)
{
    return p->rows && kern_takes_int8(w);
}

static int runs_bf16(const work *p, const num_matrix *w)
{
    return p->rows && kern_takes_bf16(w);
}

/* Rows of x that a job and those it shares x with choose from. */
static int64_t n_source_rows(const kern_job *job)
{
    return job->pick ? job->n_from : job->n_x;
}

/* Whether the rows a job reads are copied together. */
static int is_gathered(const kern_job *job)
{
    return job->pick && job->n_x > 1;
}

/* In 8 bits a panel of rows is a unit however wide it is. */
static int64_t block_rows(const work *p, const num_matrix *w)
{
    int64_t cols = w->cols;
    if (runs_int8(p, w)) return cols > 1024 ? INT8_PANEL_ROWS : 2 * INT8_PANEL_ROWS;
    int64_t n = BLOCK_FLOATS / (cols > 0 ? cols : 1) / KERN_ROWS * KERN_ROWS;
    return n < KERN_ROWS ? KERN_ROWS : n > BLOCK_MAX_ROWS ? BLOCK_MAX_ROWS : n;
}

static int64_t count_blocks(const work *p, const num_matrix *w)
{
    int64_t n = block_rows(p, w);
    return (w->rows + n - 1) / n;
}

int64_t kern_scratch_bytes(int64_t max_cols)
{
    int64_t widest = KERN_ROWS * max_cols; /* a block wider than BLOCK_FLOATS */
    int64_t floats = widest > BLOCK_FLOATS ? widest : BLOCK_FLOATS;
    int64_t bytes = (floats + floats / BF16_STEP) * (int64_t)sizeof(float);
    int64_t panel = int8_n_blocks(max_cols) * INT8_PANEL_BYTES;
    return ((bytes > panel ? bytes : panel) + 63) / 64 * 64;
}

/* A job, and where the rounded rows of its x lie, and those it reads in 8 bits: rows of an x in 8
 * bits are followed by those in bf16 and by what jobs pick of it. NULL where no job wants them. */
typedef struct place {
    const work *work;
    const kern_job *job, *end;
    char *source, *bf16, *rows, *free;
} place;

static void run_block(const place *at, int64_t block, float *scratch)
{
    const work *p = at->work;
    const kern_job *job = at->job;
    const kern_ops *ops = p->ops;
    const num_matrix *w = job->w;
    int64_t cols = w->cols, size = block_rows(p, w), first = block * size;
    int64_t n = w->rows - first < size ? w->rows - first : size;
    float *y = job->y + first;
    if (runs_int8(p, w)) {
        ops->int8->product(w, first, n, at->rows, job->n_x, y, job->ldy, scratch);
        return;
    }
    if (runs_bf16(p, w)) {
        ops->bf16->product(w, first, n, at->bf16, job->n_x, y, job->ldy, scratch);
        return;
    }
    if (job->n_x == 1 || (w->bits >= 16 && job->n_x < FEW)) {
        for (int64_t t = 0; t < job->n_x; t++)
            ops->product(w, first, n, job->x + t * job->ldx, y + t * job->ldy, scratch);
        return;
    }
    for (int64_t r = 0; r < n; r++) ops->decode[w->mode](w, first + r, scratch + r * cols);
    for (int64_t t = 0; t < job->n_x; t += KERN_TOKENS) {
        int64_t n_t = job->n_x - t < KERN_TOKENS ? job->n_x - t : KERN_TOKENS;
        for (int64_t r = 0; r < n; r += KERN_ROWS)
            ops->dots(scratch + r * cols, cols, (int)(n - r < KERN_ROWS ? n - r : KERN_ROWS),
                      job->x + t * job->ldx, job->ldx, n_t, cols, y + t * job->ldy + r, job->ldy);
    }
}

static int same_source(const kern_job *a, const kern_job *b)
{
    return a->x == b->x && a->ldx == b->ldx && a->w->cols == b->w->cols &&
           n_source_rows(a) == n_source_rows(b);
}

static int same_x(const kern_job *a, const kern_job *b)
{
    return same_source(a, b) && a->pick == b->pick && a->n_x == b->n_x;
}

static void place_rows(place *at)
{
    at->rows = at->source;
    if (!at->source) return;
    int64_t n_bytes = kern_int8_bytes(at->job->w->cols);
    if (is_gathered(at->job)) {
        at->rows = at->free;
        at->free += at->job->n_x * n_bytes;
    } else if (at->job->pick) {
        at->rows += *at->job->pick * n_bytes;
    }
}

static void place_source(place *at)
{
    int int8 = 0, bf16 = 0;
    for (const kern_job *j = at->job; j < at->end && same_source(at->job, j); j++) {
        int8 |= runs_int8(at->work, j->w);
        bf16 |= runs_bf16(at->work, j->w);
    }
    int64_t n = n_source_rows(at->job), cols = at->job->w->cols;
    at->source = int8 ? at->free : NULL;
    at->free += int8 ? n * kern_int8_bytes(cols) : 0;
    at->bf16 = bf16 ? at->free : NULL;
    at->free += bf16 ? n * kern_bf16_bytes(at->work->ops, cols) : 0;
    place_rows(at);
}

static place first_place(const work *p)
{
    place at = {.work = p, .job = p->jobs, .end = p->jobs + p->n_jobs, .free = p->rows};
    place_source(&at);
    return at;
}

static void next_place(place *at)
{
    const kern_job *before = at->job++;
    if (at->job == at->end) return;
    if (!same_source(before, at->job))
        place_source(at);
    else if (!same_x(before, at->job))
        place_rows(at);
}

/* What a product of few rows reads first of w: nobody asked for it yet. */
static void prefetch_start(const num_matrix *w)
{
    int64_t rows = KERN_PREFETCH / (w->row_bytes + 1) + 1, n = rows < w->rows ? rows : w->rows;
    kern_prefetch_all(w->codes, n * w->row_bytes);
    if (w->scales && w->group) kern_prefetch_all(w->scales, n * (w->cols / w->group));
}

/* Items are the blocks of all jobs, one job after the other. */
static void run_items(void *ctx, int64_t begin, int64_t end, int worker)
{
    const work *p = ctx;
    place at = first_place(p);
    int64_t before = 0, in_job = count_blocks(p, at.job->w);
    float *scratch = (float *)(void *)(p->scratch + worker * p->scratch_bytes);
    for (int64_t i = begin; i < end; i++) {
        while (i - before >= in_job) {
            before += in_job;
            next_place(&at);
            in_job = count_blocks(p, at.job->w);
        }
        if (i - before == in_job - 1 && at.job + 1 < at.end && at.job->n_x <= FEW)
            prefetch_start(at.job[1].w);
        run_block(&at, i - before, scratch);
    }
}

static void run_work(struct pool *p, const work *w)
{
    int64_t n_items = 0;
    for (int64_t j = 0; j < w->n_jobs; j++) n_items += count_blocks(w, w->jobs[j].w);
    pool_for(p, n_items, n_items / ((int64_t)pool_n_threads(p) * ITEMS_PER_THREAD), run_items,
             (void *)(uintptr_t)w);
}

void kern_linear_jobs(struct pool *p, const kern_ops *ops, const kern_job *jobs, int64_t n_jobs,
                      int64_t max_cols, void *scratch)
{
    work w = {ops, jobs, n_jobs, scratch, kern_scratch_bytes(max_cols), NULL};
    run_work(p, &w);
}

void kern_linear(struct pool *p, const kern_ops *ops, const num_matrix *w, const float *x,
                 int64_t ldx, int64_t n_x, float *y, int64_t ldy, void *scratch)
{
    kern_job job = {.w = w, .x = x, .y = y, .ldx = ldx, .n_x = n_x, .ldy = ldy};
    kern_linear_jobs(p, ops, &job, 1, w->cols, scratch);
}

/* ---- rounded activations -------------------------------------------------------------------- */

/* Moves `at` behind the jobs that share its x. */
static void pass_source(place *at)
{
    const kern_job *first = at->job;
    while (at->job < at->end && same_source(first, at->job)) next_place(at);
}

/* Items are the rows of x, of one x after the other. */
static void round_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const work *p = ctx;
    const kern_ops *ops = p->ops;
    place at = first_place(p);
    int64_t before = 0, n_rows = n_source_rows(at.job);
    for (int64_t i = begin; i < end; i++) {
        while (i - before >= n_rows) {
            before += n_rows;
            pass_source(&at);
            n_rows = n_source_rows(at.job);
        }
        int64_t cols = at.job->w->cols, row = i - before;
        const float *x = at.job->x + row * at.job->ldx;
        if (at.source) ops->int8->quantize(x, cols, at.source + row * kern_int8_bytes(cols));
        if (at.bf16) ops->bf16->round(x, cols, at.bf16 + row * kern_bf16_bytes(ops, cols));
    }
}

static void gather(const place *at)
{
    int64_t n_bytes = kern_int8_bytes(at->job->w->cols);
    for (int64_t i = 0; i < at->job->n_x; i++)
        memcpy(at->rows + i * n_bytes, at->source + at->job->pick[i] * n_bytes, (size_t)n_bytes);
}

/* Items are the jobs. */
static void gather_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const work *p = ctx;
    place at = first_place(p);
    for (int64_t i = 0; i < end; i++, next_place(&at))
        if (i >= begin && is_gathered(at.job) && (i == 0 || !same_x(at.job - 1, at.job)))
            gather(&at);
}

void kern_linear_jobs_fast(struct pool *p, const kern_ops *ops, const kern_job *jobs,
                           int64_t n_jobs, int64_t max_cols, void *scratch, void *rows)
{
    work w = {ops, jobs, n_jobs, scratch, kern_scratch_bytes(max_cols), rows};
    int64_t n_rows = 0;
    int gathers = 0;
    for (int64_t j = 0; j < n_jobs; j++) {
        if (j == 0 || !same_source(&jobs[j - 1], &jobs[j])) n_rows += n_source_rows(&jobs[j]);
        gathers |= is_gathered(&jobs[j]);
    }
    pool_for(p, n_rows, 16, round_rows, &w);
    if (gathers) pool_for(p, n_jobs, 8, gather_rows, &w);
    run_work(p, &w);
}
