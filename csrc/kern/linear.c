/* y = x W^T over the pool: rows in blocks, a block decoded once for all tokens. */
#include <stddef.h>
#include <string.h>

#include "base/pool.h"
#include "kern/bf16.h"
#include "kern/int8.h"
#include "kern/kern_const.h"

/* A block of decoded rows takes a quarter of a megabyte, so that it and the tokens it meets stay
 * in L2; it is also work enough (some microseconds) to be worth handing to a thread. */
enum { BLOCK_FLOATS = 64 * 1024, BLOCK_MAX_ROWS = 64, FEW = 4 };

/* Pieces of a loop, as many for each thread as even out its end. A block takes the more time the
 * more rows of x it meets; what is read from memory is better read in long pieces. */
enum { PIECES = 64, PIECES_OF_MANY = 1024 };

typedef struct work {
    const kern_ops *ops;
    kern_job *jobs;
    int64_t n_jobs;
    char *scratch;
    int64_t scratch_bytes;
    char *rows;               /* of the jobs' x, rounded; NULL in f32 */
    int64_t n_blocks, n_rows; /* of all jobs; of all x */
    int64_t most;             /* rows of x that a job meets */
    int gathers;              /* some job does */
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

static void run_block(const work *p, const kern_job *job, int64_t block, float *scratch)
{
    const kern_ops *ops = p->ops;
    const num_matrix *w = job->w;
    int64_t cols = w->cols, size = block_rows(p, w), first = block * size;
    int64_t n = w->rows - first < size ? w->rows - first : size;
    float *y = job->y + first;
    if (runs_int8(p, w)) {
        ops->int8->product(w, first, n, job->place.rows, job->n_x, y, job->ldy, scratch);
        return;
    }
    if (runs_bf16(p, w)) {
        ops->bf16->product(w, first, n, job->place.bf16, job->n_x, y, job->ldy, scratch);
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

/* Places rounded rows from `space` on; returns what is left of it. */
static char *place_source(const work *p, kern_job *job, char *space)
{
    int int8 = 0, bf16 = 0;
    for (const kern_job *j = job; j < p->jobs + p->n_jobs && same_source(job, j); j++) {
        int8 |= runs_int8(p, j->w);
        bf16 |= runs_bf16(p, j->w);
    }
    int64_t n = n_source_rows(job), cols = job->w->cols;
    job->place.source = int8 ? space : NULL;
    space += int8 ? n * kern_int8_bytes(cols) : 0;
    job->place.bf16 = bf16 ? space : NULL;
    return space + (bf16 ? n * kern_bf16_bytes(p->ops, cols) : 0);
}

static char *place_rows(kern_job *job, char *space)
{
    kern_place *at = &job->place;
    at->rows = at->source;
    if (!at->source) return space;
    int64_t n_bytes = kern_int8_bytes(job->w->cols);
    if (is_gathered(job)) {
        at->rows = space;
        return space + job->n_x * n_bytes;
    }
    if (job->pick) at->rows += *job->pick * n_bytes;
    return space;
}

/* Once for all workers, which find the job of an item by bisection. */
static void place_jobs(work *p)
{
    char *space = p->rows;
    for (kern_job *job = p->jobs; job < p->jobs + p->n_jobs; job++) {
        const kern_job *before = job > p->jobs ? job - 1 : NULL;
        if (before && same_source(before, job)) {
            job->place = before->place;
        } else {
            job->place.first_row = p->n_rows;
            p->n_rows += n_source_rows(job);
            space = place_source(p, job, space);
        }
        if (!before || !same_x(before, job)) space = place_rows(job, space);
        p->gathers |= is_gathered(job);
        if (job->n_x > p->most) p->most = job->n_x;
        job->place.first_block = p->n_blocks;
        p->n_blocks += count_blocks(p, job->w);
    }
}

static int64_t first_item(const kern_job *job, int is_row)
{
    return is_row ? job->place.first_row : job->place.first_block;
}

/* The last job whose first block, or the first row of whose x, is not behind this one. */
static const kern_job *job_of(const work *p, int64_t item, int is_row)
{
    const kern_job *job = p->jobs, *end = p->jobs + p->n_jobs;
    while (end - job > 1) {
        const kern_job *middle = job + (end - job) / 2;
        if (first_item(middle, is_row) <= item)
            job = middle;
        else
            end = middle;
    }
    return job;
}

/* What a product reads first of w: nobody asked for it yet. */
static void prefetch_start(const num_matrix *w)
{
    int64_t rows = KERN_PREFETCH / (w->row_bytes + 1) + 1, n = rows < w->rows ? rows : w->rows;
    kern_prefetch_all(w->codes, 0, n * w->row_bytes);
    if (w->scales && w->group) kern_prefetch_all(w->scales, 0, n * (w->cols / w->group));
}

/* Items are the blocks of all jobs, one job after the other. */
static void run_items(void *ctx, int64_t begin, int64_t end, int worker)
{
    const work *p = ctx;
    const kern_job *job = job_of(p, begin, 0), *last = p->jobs + p->n_jobs - 1;
    float *scratch = (float *)(void *)(p->scratch + worker * p->scratch_bytes);
    for (int64_t i = begin; i < end; i++) {
        while (job < last && job[1].place.first_block <= i) job++;
        if (job < last && job[1].place.first_block == i + 1) prefetch_start(job[1].w);
        run_block(p, job, i - job->place.first_block, scratch);
    }
}

static void run_work(struct pool *p, work *w)
{
    int64_t pieces = pool_n_threads(p) * (w->most > FEW ? PIECES_OF_MANY : PIECES);
    pool_for(p, w->n_blocks, w->n_blocks / pieces, run_items, w);
}

static work work_of(const kern_ops *ops, kern_job *jobs, int64_t n_jobs, int64_t max_cols,
                    void *scratch, void *rows)
{
    work w = {.ops = ops,
              .jobs = jobs,
              .n_jobs = n_jobs,
              .scratch = scratch,
              .scratch_bytes = kern_scratch_bytes(max_cols),
              .rows = rows};
    place_jobs(&w);
    return w;
}

void kern_linear_jobs(struct pool *p, const kern_ops *ops, kern_job *jobs, int64_t n_jobs,
                      int64_t max_cols, void *scratch)
{
    work w = work_of(ops, jobs, n_jobs, max_cols, scratch, NULL);
    run_work(p, &w);
}

void kern_linear(struct pool *p, const kern_ops *ops, const num_matrix *w, const float *x,
                 int64_t ldx, int64_t n_x, float *y, int64_t ldy, void *scratch)
{
    kern_job job = {.w = w, .x = x, .y = y, .ldx = ldx, .n_x = n_x, .ldy = ldy};
    kern_linear_jobs(p, ops, &job, 1, w->cols, scratch);
}

/* ---- rounded activations -------------------------------------------------------------------- */

/* Items are the rows of x, of one x after the other. */
static void round_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const work *p = ctx;
    const kern_ops *ops = p->ops;
    const kern_job *job = job_of(p, begin, 1), *last = p->jobs + p->n_jobs - 1;
    for (int64_t i = begin; i < end; i++) {
        while (job < last && job[1].place.first_row <= i) job++;
        const kern_place *at = &job->place;
        int64_t cols = job->w->cols, row = i - at->first_row;
        const float *x = job->x + row * job->ldx;
        if (at->source) ops->int8->quantize(x, cols, at->source + row * kern_int8_bytes(cols));
        if (at->bf16) ops->bf16->round(x, cols, at->bf16 + row * kern_bf16_bytes(ops, cols));
    }
}

/* Items are the jobs. */
static void gather_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const work *p = ctx;
    for (const kern_job *job = p->jobs + begin; job < p->jobs + end; job++) {
        if (!is_gathered(job) || (job > p->jobs && same_x(job - 1, job))) continue;
        int64_t n_bytes = kern_int8_bytes(job->w->cols);
        for (int64_t i = 0; i < job->n_x; i++)
            memcpy(job->place.rows + i * n_bytes, job->place.source + job->pick[i] * n_bytes,
                   (size_t)n_bytes);
    }
}

void kern_linear_jobs_fast(struct pool *p, const kern_ops *ops, kern_job *jobs, int64_t n_jobs,
                           int64_t max_cols, void *scratch, void *rows)
{
    work w = work_of(ops, jobs, n_jobs, max_cols, scratch, rows);
    pool_for(p, w.n_rows, 16, round_rows, &w);
    if (w.gathers) pool_for(p, n_jobs, 8, gather_rows, &w);
    run_work(p, &w);
}
