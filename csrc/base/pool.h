/* pool: a fixed set of threads that share one loop at a time.
 *
 * The calling thread is worker 0 and takes part, so a pool of one starts no thread. Workers spin
 * briefly between loops (a decode step is hundreds of short loops), then sleep; no more of them are
 * woken than there are processors. One caller at a time; the pool is not reentrant. Nothing here
 * depends on which worker runs an item, and callers must not either: results may not depend on the
 * number of threads.
 *
 * A process forked between two loops may go on using its copy: the workers are not there, and the
 * calling thread does everything. */
#ifndef BASE_POOL_H
#define BASE_POOL_H

#include <stdint.h>

#include "base/cancel.h"
#include "base/err.h"

typedef struct pool pool;

enum { POOL_MAX_THREADS = 1024 };

/* 1 <= n_threads <= POOL_MAX_THREADS. NULL on failure. Closed with pool_close, which joins the
 * threads. */
pool *pool_open(int n_threads, err_info *e);
void pool_close(pool *p);
int pool_n_threads(const pool *p);

/* fn handles items [begin, end); worker < pool_n_threads(p) picks its scratch space. */
typedef void (*pool_fn)(void *ctx, int64_t begin, int64_t end, int worker);

/* Runs fn over [0, n_items) in pieces of `grain` (the last may be shorter); returns when all are
 * done. Each worker takes an equal stretch in order, as memory likes to be read; one that has done
 * its own goes on with the second half of what another has before it. Pieces may be small, and
 * small ones even out the end. Small loops run on the calling thread alone. */
void pool_for(pool *p, int64_t n_items, int64_t grain, pool_fn fn, void *ctx);

/* Until the next call, workers look at `cancel` before each piece (NULL: never). Once one has found
 * it raised, whatever becomes of the flag, the loop is cut: pieces that nobody has begun are left
 * out, and so are all loops behind it. A piece that runs therefore finds everything that earlier
 * loops were to make; what the caller itself reads may be missing once the pool is cut. */
void pool_watch(pool *p, const cancel_flag *cancel);
int pool_is_cut(const pool *p);
/* The look before a piece: false when cut. Within long pieces fn may look, too, and return. */
int pool_goes_on(pool *p);

#endif
