/* kv_page: key and value rows in pages that sequences share. Internal to the model room.
 *
 * A page holds KV_PAGE_ROWS positions of one sequence, for all attention layers and the MTP block:
 *   [layer slot][keys, values][head], keys [D][KV_PAGE_ROWS], values [KV_PAGE_ROWS][D], and sizes
 *   behind them, as kern_kv has them
 * Pages are counted by reference and copied before they are written while somebody else holds
 * them, so that forks and snapshots cost no rows. A pool hands them out; what a session or a
 * snapshot may come to own is promised to it when it is made, so that taking a page in the middle
 * of a decode step neither allocates nor fails. Not thread-safe: one thread drives a model. */
#ifndef MODEL_KV_PAGE_H
#define MODEL_KV_PAGE_H

#include <stdint.h>

#include "base/err.h"
#include "kern/kern.h"

enum { KV_PAGE_ROWS = KERN_PAGE };

typedef struct kv_page {
    char *rows;
    int64_t n_refs;
    int64_t n_kept;       /* of them, by snapshots */
    struct kv_page *next; /* in the free list */
} kv_page;

typedef struct kv_pool kv_pool;

/* Pages of page_bytes each. NULL on failure. Closing frees every page, taken or not. */
kv_pool *kv_pool_open(int64_t page_bytes, err_info *e);
void kv_pool_close(kv_pool *p);

/* n more pages can be taken until they are given back with kv_pool_return. Memory is touched only
 * when pages are written, and goes back to the system when nothing is promised any more. */
err_code kv_pool_promise(kv_pool *p, int64_t n, err_info *e);
void kv_pool_return(kv_pool *p, int64_t n);

/* A page with one reference; its rows are not cleared. Within what was promised. */
kv_page *kv_page_take(kv_pool *p);
/* One reference more or less, of a session; no page to drop is fine. */
void kv_page_share(kv_pool *p, kv_page *page);
void kv_page_drop(kv_pool *p, kv_page *page);
/* Likewise, of a snapshot. */
void kv_page_keep(kv_pool *p, kv_page *page);
void kv_page_let_go(kv_pool *p, kv_page *page);

/* *page with one reference: itself, or a copy that replaces it; NULL becomes a new page. */
void kv_page_own(kv_pool *p, kv_page **page);

int64_t kv_pool_page_bytes(const kv_pool *p);
int64_t kv_pool_n_used(const kv_pool *p); /* pages with a reference */
int64_t kv_pool_n_kept(const kv_pool *p); /* of them, those that only snapshots hold */

#endif
