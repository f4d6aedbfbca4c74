#include "base/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "base/mem.h"

/* About 50 us of spinning: longer than the gap between two loops of a decode step, short enough
 * to be invisible when the model is idle. */
enum { SPIN_ROUNDS = 20000 };

typedef struct worker {
    pool *owner;
    pthread_t thread;
    int index;
} worker;

struct pool {
    int n_threads;
    worker *workers;

    pool_fn fn;
    void *ctx;
    int64_t n_items, grain;

    /* `epoch` announces a loop, `next` hands out items, `busy` counts workers still inside. */
    _Alignas(64) atomic_uint epoch;
    _Alignas(64) atomic_llong next;
    _Alignas(64) atomic_int busy;
    atomic_int quit;
    atomic_int sleepers;

    pthread_mutex_t lock;
    pthread_cond_t wake;
};

static void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_items(pool *p, int index)
{
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&p->next, p->grain, memory_order_relaxed);
        if (begin >= p->n_items) return;
        int64_t end = begin + p->grain;
        p->fn(p->ctx, begin, end < p->n_items ? end : p->n_items, index);
    }
}

static void wait_for_epoch(pool *p, unsigned seen)
{
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (atomic_load_explicit(&p->epoch, memory_order_acquire) != seen) return;
        cpu_relax();
    }
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(&p->epoch) == seen) pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->lock);
}

static void *worker_main(void *arg)
{
    worker *w = arg;
    pool *p = w->owner;
    unsigned seen = 0;
    for (;;) {
        wait_for_epoch(p, seen);
        seen++;
        if (atomic_load(&p->quit)) return NULL;
        take_items(p, w->index);
        atomic_fetch_sub_explicit(&p->busy, 1, memory_order_release);
    }
}

static void announce(pool *p)
{
    atomic_fetch_add(&p->epoch, 1);
    /* A worker counts itself as a sleeper under the lock and re-reads the epoch there, so either
     * it sees the new epoch or we see the sleeper. */
    if (atomic_load(&p->sleepers) > 0) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
}

pool *pool_open(int n_threads, err_info *e)
{
    if (n_threads < 1 || n_threads > 1024) {
        err_set(e, ERR_RANGE, "threads: %d is not between 1 and 1024", n_threads);
        return NULL;
    }
    pool *p = mem_array(1, sizeof *p, e);
    if (!p) return NULL;
    p->workers = mem_array((size_t)n_threads, sizeof *p->workers, e);
    if (!p->workers) {
        mem_free(p);
        return NULL;
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->n_threads = n_threads;
    for (int i = 1; i < n_threads; i++) {
        p->workers[i] = (worker){.owner = p, .index = i};
        if (pthread_create(&p->workers[i].thread, NULL, worker_main, &p->workers[i]) != 0) {
            p->n_threads = i;
            pool_close(p);
            err_set(e, ERR_MEMORY, "cannot start thread %d of %d", i + 1, n_threads);
            return NULL;
        }
    }
    return p;
}

void pool_close(pool *p)
{
    if (!p) return;
    atomic_store(&p->quit, 1);
    announce(p);
    for (int i = 1; i < p->n_threads; i++) pthread_join(p->workers[i].thread, NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    mem_free(p->workers);
    mem_free(p);
}

int pool_n_threads(const pool *p)
{
    return p->n_threads;
}

void pool_for(pool *p, int64_t n_items, int64_t grain, pool_fn fn, void *ctx)
{
    if (n_items <= 0) return;
    if (grain < 1) grain = 1;
    if (p->n_threads == 1 || n_items <= grain) {
        fn(ctx, 0, n_items, 0);
        return;
    }
    p->fn = fn;
    p->ctx = ctx;
    p->n_items = n_items;
    p->grain = grain;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_store_explicit(&p->busy, p->n_threads - 1, memory_order_relaxed);
    announce(p);
    take_items(p, 0);
    for (int i = 0; atomic_load_explicit(&p->busy, memory_order_acquire) > 0; i++) {
        cpu_relax();
        if (i >= SPIN_ROUNDS) sched_yield(); /* somebody else has that worker's core */
    }
}
