/* blas: loading OpenBLAS, and sums of outer products over the pool. */
#include "kern/blas.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "base/pool.h"

/* ---- loading -------------------------------------------------------------------------------- */

/* Gives an environment variable a value for the time of loading; OpenBLAS looks at it once. A
 * value that the user gave stays. True if it must be removed again. */
static int lend(const char *name, const char *value)
{
    return value && !getenv(name) && setenv(name, value, 1) == 0;
}

/* Haswell's kernels serve AMD's Zen equally well, SkylakeX's every later AVX-512 processor. */
static const char *core_type(void)
{
    cpu_level here = cpu_detect();
    return here >= CPU_AVX512_BASE ? "SkylakeX" : here == CPU_AVX2 ? "Haswell" : NULL;
}

static void *open_library(err_info *e)
{
    static const char *const names[] = {"libopenblas.so.0", "libopenblas.so"};
    int has_core = lend("OPENBLAS_CORETYPE", core_type());
    int has_threads = lend("OPENBLAS_NUM_THREADS", "1"); /* else it starts them while loading */
    void *lib = NULL;
    const char *why = NULL;
    for (size_t i = 0; !lib && i < sizeof names / sizeof *names; i++) {
        lib = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
        if (!lib) {
            const char *text = dlerror();
            if (!why) err_set(e, ERR_UNSUPPORTED, "%s", why = text ? text : names[i]);
        }
    }
    if (has_core) unsetenv("OPENBLAS_CORETYPE");
    if (has_threads) unsetenv("OPENBLAS_NUM_THREADS");
    if (!lib) err_prefix(e, "OpenBLAS is missing (Debian: apt-get install libopenblas0)");
    return lib;
}

/* dlsym's object pointer as a function pointer: POSIX says that the bits are the same. */
static int find(void *lib, const char *name, void *function, err_info *e)
{
    void *p = dlsym(lib, name);
    if (!p) return err_set(e, ERR_UNSUPPORTED, "libopenblas has no function %s", name);
    memcpy(function, &p, sizeof p);
    return 0;
}

err_code blas_load(blas *b, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    *b = (blas){0};
    void *lib = open_library(e);
    if (!lib) return e->code;
    char *(*corename)(void) = NULL;
    void (*set_threads)(int) = NULL;
    if (find(lib, "cblas_sgemm", &b->sgemm, e) || find(lib, "cblas_ssyrk", &b->ssyrk, e) ||
        find(lib, "openblas_get_corename", &corename, e) ||
        find(lib, "openblas_set_num_threads", &set_threads, e))
        return e->code;
    set_threads(1);
    b->core = corename();
    return ERR_NONE;
}

/* ---- sums of outer products ----------------------------------------------------------------- */

/* Columns of a tile: a megabyte of H, some milliseconds of work. */
enum { TILE = 512 };

typedef struct gram_work {
    const blas *b;
    const blas_gram_job *jobs;
} gram_work;

static int64_t tiles_across(const blas_gram_job *job)
{
    return (job->cols + TILE - 1) / TILE;
}

static int64_t count_tiles(const blas_gram_job *job)
{
    int64_t n = tiles_across(job);
    return job->n ? n * (n + 1) / 2 : 0;
}

static int tile_width(const blas_gram_job *job, int64_t first)
{
    return (int)(job->cols - first < TILE ? job->cols - first : TILE);
}

/* Tile `i` of the upper triangle, counted row by row. */
static void run_tile(const blas *b, const blas_gram_job *job, int64_t i)
{
    int64_t row = 0, n = tiles_across(job);
    for (; i >= n - row; row++) i -= n - row;
    int64_t first = row * TILE, second = first + i * TILE;
    int rows = tile_width(job, first), cols = tile_width(job, second);
    float *h = job->h + first * job->cols + second;
    const float *left = job->x + first, *right = job->x + second;
    int k = (int)job->n, ld = (int)job->cols;
    if (i == 0)
        b->ssyrk(BLAS_ROW_MAJOR, BLAS_UPPER, BLAS_TRANSPOSED, rows, k, 1, left, ld, 1, h, ld);
    else
        b->sgemm(BLAS_ROW_MAJOR, BLAS_TRANSPOSED, BLAS_PLAIN, rows, cols, k, 1, left, ld, right, ld,
                 1, h, ld);
}

/* Items are the tiles of all jobs, one job after the other. */
static void run_tiles(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const gram_work *w = ctx;
    const blas_gram_job *job = w->jobs;
    int64_t before = 0;
    for (int64_t i = begin; i < end; i++) {
        while (i - before >= count_tiles(job)) before += count_tiles(job++);
        run_tile(w->b, job, i - before);
    }
}

void blas_gram(const blas *b, struct pool *p, const blas_gram_job *jobs, int64_t n_jobs)
{
    gram_work w = {b, jobs};
    int64_t n_tiles = 0;
    for (int64_t j = 0; j < n_jobs; j++) n_tiles += count_tiles(&jobs[j]);
    /* Never more pieces than calls may run at a time. */
    pool_for(p, n_tiles, (n_tiles + BLAS_MAX_CALLS - 1) / BLAS_MAX_CALLS, run_tiles, &w);
}

typedef struct mirror_work {
    float *A;
    int64_t n;
} mirror_work;

/* Bands of SIDE rows, square by square: a column of a large matrix is a page per row. */
enum { SIDE = 32 };

static void mirror_bands(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const mirror_work *w = ctx;
    int64_t last = end * SIDE < w->n ? end * SIDE : w->n;
    for (int64_t left = 0; left < last; left += SIDE)
        for (int64_t r = begin * SIDE; r < last; r++)
            for (int64_t c = left; c < left + SIDE && c < r; c++)
                w->A[r * w->n + c] = w->A[c * w->n + r];
}

void blas_mirror(struct pool *p, float *A, int64_t n)
{
    mirror_work w = {A, n};
    pool_for(p, (n + SIDE - 1) / SIDE, 1, mirror_bands, &w);
}
