/* y = x W^T over the pool: rows in blocks, a block decoded once for all tokens. */
#include "base/pool.h"
#include "kern/kern.h"

/* A block of decoded rows takes a quarter of a megabyte, so that it and the tokens it meets stay
 * in L2; it is also work enough (some microseconds) to be worth handing to a thread. */
enum { BLOCK_FLOATS = 64 * 1024, BLOCK_MAX_ROWS = 64, TOKENS = 32, ITEMS_PER_THREAD = 16 };

static int64_t block_rows(int64_t cols)
{
    int64_t n = BLOCK_FLOATS / (cols > 0 ? cols : 1) / KERN_ROWS * KERN_ROWS;
    return n < KERN_ROWS ? KERN_ROWS : n > BLOCK_MAX_ROWS ? BLOCK_MAX_ROWS : n;
}

static int64_t count_blocks(const num_matrix *w)
{
    int64_t n = block_rows(w->cols);
    return (w->rows + n - 1) / n;
}

int64_t kern_scratch_bytes(int64_t max_cols)
{
    int64_t widest = KERN_ROWS * max_cols; /* a block wider than BLOCK_FLOATS */
    int64_t floats = widest > BLOCK_FLOATS ? widest : BLOCK_FLOATS;
    return (floats * (int64_t)sizeof(float) + 63) / 64 * 64;
}

static void run_block(const kern_ops *ops, const kern_job *job, int64_t block, float *scratch)
{
    const num_matrix *w = job->w;
    int64_t cols = w->cols, first = block * block_rows(cols);
    int64_t n = w->rows - first < block_rows(cols) ? w->rows - first : block_rows(cols);
    float *y = job->y + first;
    if (job->n_x == 1) {
        ops->product(w, first, n, job->x, y, scratch);
        return;
    }
    for (int64_t r = 0; r < n; r++) ops->decode[w->mode](w, first + r, scratch + r * cols);
    for (int64_t t = 0; t < job->n_x; t += TOKENS) {
        int64_t n_t = job->n_x - t < TOKENS ? job->n_x - t : TOKENS;
        for (int64_t r = 0; r < n; r += KERN_ROWS)
            ops->dots(scratch + r * cols, cols, (int)(n - r < KERN_ROWS ? n - r : KERN_ROWS),
                      job->x + t * job->ldx, job->ldx, n_t, cols, y + t * job->ldy + r, job->ldy);
    }
}

typedef struct work {
    const kern_ops *ops;
    const kern_job *jobs;
    char *scratch;
    int64_t scratch_bytes;
} work;

/* Items are the blocks of all jobs, one job after the other. */
static void run_items(void *ctx, int64_t begin, int64_t end, int worker)
{
    const work *p = ctx;
    const kern_job *job = p->jobs;
    int64_t before = 0, in_job = count_blocks(job->w);
    float *scratch = (float *)(void *)(p->scratch + worker * p->scratch_bytes);
    for (int64_t i = begin; i < end; i++) {
        while (i - before >= in_job) {
            before += in_job;
            in_job = count_blocks((++job)->w);
        }
        run_block(p->ops, job, i - before, scratch);
    }
}

void kern_linear_jobs(struct pool *p, const kern_ops *ops, const kern_job *jobs, int64_t n_jobs,
                      int64_t max_cols, void *scratch)
{
    work w = {ops, jobs, scratch, kern_scratch_bytes(max_cols)};
    int64_t n_items = 0;
    for (int64_t j = 0; j < n_jobs; j++) n_items += count_blocks(jobs[j].w);
    pool_for(p, n_items, n_items / ((int64_t)pool_n_threads(p) * ITEMS_PER_THREAD), run_items, &w);
}

void kern_linear(struct pool *p, const kern_ops *ops, const num_matrix *w, const float *x,
                 int64_t ldx, int64_t n_x, float *y, int64_t ldy, void *scratch)
{
    kern_job job = {.w = w, .x = x, .y = y, .ldx = ldx, .n_x = n_x, .ldy = ldy};
    kern_linear_jobs(p, ops, &job, 1, w->cols, scratch);
}
