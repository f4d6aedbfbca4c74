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

/* Pieces of a loop that a worker has before it: the next one, and in the upper half the one behind
 * the last. The worker takes them from the front; who has none left takes half of them from the
 * back, so that both go on in order. */
typedef struct share {
    _Alignas(64) atomic_ullong pieces;
} share;

struct pool {
    int n_threads;
    int n_useful;  /* workers that there are processors for, without the caller */
    pid_t process; /* the one that has the workers */
    worker *workers;

    pool_fn fn;
    void *ctx;
    int64_t n_items, grain;
    share *shares; /* [n_threads] */
    const cancel_flag *watched;
    atomic_int is_cut;

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

static unsigned long long pack_pieces(int64_t begin, int64_t end)
{
    return (unsigned long long)begin | (unsigned long long)end << 32;
}

static int64_t first_piece(unsigned long long pieces)
{
    return (int64_t)(pieces & UINT32_MAX);
}

static int64_t n_pieces(unsigned long long pieces)
{
    return (int64_t)(pieces >> 32) - first_piece(pieces);
}

static unsigned long long look(share *s)
{
    return atomic_load_explicit(&s->pieces, memory_order_relaxed);
}

int pool_goes_on(pool *p)
{
    if (!p->watched) return 1;
    if (cancel_raised(p->watched)) atomic_store_explicit(&p->is_cut, 1, memory_order_relaxed);
    return !pool_is_cut(p);
}

int pool_is_cut(const pool *p)
{
    return atomic_load_explicit(&((pool *)(uintptr_t)p)->is_cut, memory_order_relaxed);
}

void pool_watch(pool *p, const cancel_flag *cancel)
{
    p->watched = cancel;
    atomic_store_explicit(&p->is_cut, 0, memory_order_relaxed);
}

/* False when the loop is cut. */
static int run_pieces(pool *p, share *own, int index)
{
    while (n_pieces(look(own)) > 0) {
        if (!pool_goes_on(p)) return 0;
        /* the last one may just have been taken away; then the front passes the end by one */
        unsigned long long now = atomic_fetch_add_explicit(&own->pieces, 1, memory_order_relaxed);
        int64_t begin = first_piece(now) * p->grain, left = p->n_items - begin;
        if (n_pieces(now) > 0)
            p->fn(p->ctx, begin, begin + (left < p->grain ? left : p->grain), index);
    }
    return 1;
}

/* Moves half of what the worker with most has left into a share that has run out. */
static int find_pieces(pool *p, share *own)
{
    for (;;) {
        share *from = NULL;
        unsigned long long most = 0;
        for (share *s = p->shares; s < p->shares + p->n_threads; s++) {
            unsigned long long now = look(s);
            if (n_pieces(now) <= 0 || (from && n_pieces(now) <= n_pieces(most))) continue;
            from = s;
            most = now;
        }
        if (!from) return 0;
        int64_t begin = first_piece(most), n = n_pieces(most), middle = begin + n / 2;
        if (!atomic_compare_exchange_strong_explicit(&from->pieces, &most,
                                                     pack_pieces(begin, middle),
                                                     memory_order_relaxed, memory_order_relaxed))
            continue;
        atomic_store_explicit(&own->pieces, pack_pieces(middle, begin + n), memory_order_relaxed);
        return 1;
    }
}

static void take_items(pool *p, int index)
{
    share *own = &p->shares[index];
    while (run_pieces(p, own, index) && find_pieces(p, own))
        ;
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

/* Entering is what makes fn, ctx, n_items, grain, shares and `watched` readable: they do not change
 * while anybody is inside. That the loop may be a later one than the epoch told of does no harm. */
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

static void share_out(pool *p, int64_t n_pieces_in_all)
{
    int64_t begin = 0;
    for (int i = 0; i < p->n_threads; i++) {
        int64_t end = n_pieces_in_all * (i + 1) / p->n_threads;
        atomic_store_explicit(&p->shares[i].pieces, pack_pieces(begin, end), memory_order_relaxed);
        begin = end;
    }
}

/* On the calling thread. In pieces only where somebody may cut them. */
static void run_alone(pool *p, int64_t n_items, int64_t grain, pool_fn fn, void *ctx)
{
    if (!p->watched) grain = n_items;
    for (int64_t begin = 0; begin < n_items && pool_goes_on(p); begin += grain)
        fn(ctx, begin, n_items - begin < grain ? n_items : begin + grain, 0);
}

void pool_for(pool *p, int64_t n_items, int64_t grain, pool_fn fn, void *ctx)
{
    if (n_items <= 0 || pool_is_cut(p)) return;
    int64_t least = n_items / INT32_MAX + 1; /* pieces are counted in 32 bits */
    if (grain < least) grain = least;
    if (p->n_threads == 1 || n_items <= grain) {
        run_alone(p, n_items, grain, fn, ctx);
        return;
    }
    p->fn = fn;
    p->ctx = ctx;
    p->n_items = n_items;
    p->grain = grain;
    share_out(p, (n_items - 1) / grain + 1);
    atomic_store_explicit(&p->gate, OPEN, memory_order_release);
    announce(p);
    take_items(p, 0);
    atomic_fetch_and_explicit(&p->gate, ~(unsigned)OPEN, memory_order_acq_rel);
    for (unsigned i = 1; atomic_load_explicit(&p->gate, memory_order_acquire) != 0; i++) {
        cpu_relax();
        if (i % ROUNDS_PER_YIELD == 0) sched_yield(); /* somebody has that worker's processor */
    }
}
