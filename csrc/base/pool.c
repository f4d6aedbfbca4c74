#include "base/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/mem.h"

/* How long a worker spins before it sleeps: longer than the gap between two loops of a decode
 * step, since waking up costs tens of microseconds; short enough to be invisible when idle. */
#define SPIN_SECONDS 100e-6
enum { ROUNDS_PER_LOOK = 32, ROUNDS_PER_YIELD = 4096 };

typedef struct worker {
    pool *owner;
    pthread_t thread;
    int index;
} worker;

enum { OPEN = 1, ENTRY = 2 };

/* Items of a loop that a worker begins with; whoever takes some moves `next`. */
typedef struct share {
    _Alignas(64) atomic_llong next;
    int64_t end;
} share;

struct pool {
    int n_threads;
    int n_useful;  /* workers that there are processors for, without the caller */
    pid_t process; /* the one that has the workers */
    worker *workers;

    pool_fn fn;
    void *ctx;
    int64_t grain;
    share *shares; /* [n_threads] */

    /* `epoch` announces a loop. `gate` is OPEN while workers may join, plus ENTRY for each one
     * inside. The caller waits only for those: a worker that is asleep or without a processor when
     * the items run out delays nobody, as others take its share. */
    _Alignas(64) atomic_uint epoch;
    _Alignas(64) atomic_uint gate;
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

/* Piece by piece of the worker's own share, then of the others'. */
static void take_items(pool *p, int index)
{
    for (int i = 0, n = p->n_threads; i < n; i++) {
        share *s = &p->shares[index + i < n ? index + i : index + i - n];
        while (atomic_load_explicit(&s->next, memory_order_relaxed) < s->end) {
            int64_t begin = atomic_fetch_add_explicit(&s->next, p->grain, memory_order_relaxed);
            int64_t end = begin + p->grain;
            if (begin < s->end) p->fn(p->ctx, begin, end < s->end ? end : s->end, index);
        }
    }
}

/* Returns the epoch once it differs from `seen`. */
static unsigned wait_for_epoch(pool *p, unsigned seen)
{
    unsigned now;
    double limit = clock_seconds() + SPIN_SECONDS;
    do {
        for (int i = 0; i < ROUNDS_PER_LOOK; i++) {
            now = atomic_load_explicit(&p->epoch, memory_order_acquire);
            if (now != seen) return now;
            cpu_relax();
        }
    } while (clock_seconds() < limit);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleepers, 1);
    while ((now = atomic_load(&p->epoch)) == seen) pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->lock);
    return now;
}

/* Entering is what makes fn, ctx, grain and shares readable: they do not change while anybody is
 * inside. That the loop may be a later one than the epoch told of does no harm. */
static int enter(pool *p)
{
    unsigned g = atomic_load_explicit(&p->gate, memory_order_relaxed);
    while (g & OPEN)
        if (atomic_compare_exchange_weak_explicit(&p->gate, &g, g + ENTRY, memory_order_acquire,
                                                  memory_order_relaxed))
            return 1;
    return 0;
}

static void *worker_main(void *arg)
{
    worker *w = arg;
    pool *p = w->owner;
    unsigned seen = 0;
    for (;;) {
        seen = wait_for_epoch(p, seen);
        if (atomic_load(&p->quit)) return NULL;
        if (!enter(p)) continue;
        take_items(p, w->index);
        atomic_fetch_sub_explicit(&p->gate, ENTRY, memory_order_release);
    }
}

/* In a forked child the lock may be held, and the condition awaited, by threads that are gone. */
static int is_ours(const pool *p)
{
    return getpid() == p->process;
}

static void announce(pool *p)
{
    atomic_fetch_add(&p->epoch, 1);
    /* A worker counts itself as a sleeper under the lock and re-reads the epoch there, so either
     * it sees the new epoch or we see the sleeper. */
    int n = atomic_load(&p->sleepers) - (p->n_threads - 1 - p->n_useful);
    if (n > 0 && is_ours(p)) {
        pthread_mutex_lock(&p->lock);
        while (n-- > 0) pthread_cond_signal(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
}

/* Workers are born with signals blocked, so that those go to the caller's threads, where handlers
 * and interrupted system calls are expected. Faults stay deliverable to whoever reports them. */
static err_code start_workers(pool *p, err_info *e)
{
    sigset_t all, before;
    err_code code = ERR_NONE;
    sigfillset(&all);
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1, n = p->n_threads; i < n && code == ERR_NONE; i++) {
        worker *w = &p->workers[i];
        *w = (worker){.owner = p, .index = i};
        if (pthread_create(&w->thread, NULL, worker_main, w) == 0) continue;
        p->n_threads = i; /* those to join */
        code = err_set(e, ERR_MEMORY, "cannot start thread %d of %d", i + 1, n);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return code;
}

pool *pool_open(int n_threads, err_info *e)
{
    if (n_threads < 1 || n_threads > POOL_MAX_THREADS) {
        err_set(e, ERR_RANGE, "threads: %d is not between 1 and %d", n_threads, POOL_MAX_THREADS);
        return NULL;
    }
    pool *p = mem_array(1, sizeof *p, e);
    if (!p) return NULL;
    if (!(p->workers = mem_array((size_t)n_threads, sizeof *p->workers, e)) ||
        !(p->shares = mem_array((size_t)n_threads, sizeof *p->shares, e))) {
        mem_free(p->workers);
        mem_free(p);
        return NULL;
    }
    int n_processors = cpu_count();
    p->n_threads = n_threads;
    p->n_useful = (n_threads < n_processors ? n_threads : n_processors) - 1;
    p->process = getpid();
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    if (start_workers(p, e) != ERR_NONE) {
        pool_close(p);
        return NULL;
    }
    return p;
}

void pool_close(pool *p)
{
    if (!p) return;
    if (is_ours(p)) {
        atomic_store(&p->quit, 1);
        p->n_useful = p->n_threads - 1;
        announce(p);
        for (int i = 1; i < p->n_threads; i++) pthread_join(p->workers[i].thread, NULL);
        pthread_cond_destroy(&p->wake);
        pthread_mutex_destroy(&p->lock);
    }
    mem_free(p->workers);
    mem_free(p->shares);
    mem_free(p);
}

int pool_n_threads(const pool *p)
{
    return p->n_threads;
}

static void share_out(pool *p, int64_t n_items)
{
    int64_t n_pieces = (n_items - 1) / p->grain + 1, n = p->n_threads, begin = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t end = i == n - 1 ? n_items : (n_pieces * (i + 1) / n) * p->grain;
        atomic_store_explicit(&p->shares[i].next, begin, memory_order_relaxed);
        p->shares[i].end = begin = end;
    }
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
    p->grain = grain;
    share_out(p, n_items);
    atomic_store_explicit(&p->gate, OPEN, memory_order_release);
    announce(p);
    take_items(p, 0);
    atomic_fetch_and_explicit(&p->gate, ~(unsigned)OPEN, memory_order_acq_rel);
    for (unsigned i = 1; atomic_load_explicit(&p->gate, memory_order_acquire) != 0; i++) {
        cpu_relax();
        if (i % ROUNDS_PER_YIELD == 0) sched_yield(); /* somebody has that worker's processor */
    }
}
