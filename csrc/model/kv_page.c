#include "model/kv_page.h"

#include <string.h>

#include "base/mem.h"

/* Pages come in slabs: one piece of address space for what one promise lacked. */
typedef struct slab {
    struct slab *next;
    char *rows;
    int64_t n_pages;
    kv_page pages[];
} slab;

struct kv_pool {
    int64_t page_bytes;
    int64_t n_pages, n_used, n_kept, n_promised;
    slab *slabs;
    kv_page *free; /* last dropped first: its memory is warm */
};

kv_pool *kv_pool_open(int64_t page_bytes, err_info *e)
{
    kv_pool *p = mem_array(1, sizeof *p, e);
    if (p) p->page_bytes = page_bytes;
    return p;
}

static void free_slabs(kv_pool *p)
{
    for (slab *s = p->slabs, *next; s; s = next) {
        next = s->next;
        mem_pages_free(s->rows, (size_t)(s->n_pages * p->page_bytes));
        mem_free(s);
    }
    p->slabs = NULL;
    p->free = NULL;
    p->n_pages = 0;
}

void kv_pool_close(kv_pool *p)
{
    if (!p) return;
    free_slabs(p);
    mem_free(p);
}

static err_code add_slab(kv_pool *p, int64_t n, err_info *e)
{
    int64_t bytes;
    size_t head;
    if (__builtin_mul_overflow(n, p->page_bytes, &bytes) ||
        __builtin_mul_overflow((size_t)n, sizeof(kv_page), &head) ||
        __builtin_add_overflow(head, sizeof(slab), &head))
        return err_set(e, ERR_MEMORY, "%lld pages of keys and values do not fit in memory",
                       (long long)n);
    slab *s = mem_array(1, head, e);
    if (!s) return e->code;
    s->rows = mem_large_pages((size_t)bytes, e);
    if (!s->rows) {
        mem_free(s);
        return e->code;
    }
    s->n_pages = n;
    s->next = p->slabs;
    p->slabs = s;
    p->n_pages += n;
    for (int64_t i = n - 1; i >= 0; i--) {
        s->pages[i] = (kv_page){.rows = s->rows + i * p->page_bytes, .next = p->free};
        p->free = &s->pages[i];
    }
    return ERR_NONE;
}

err_code kv_pool_promise(kv_pool *p, int64_t n, err_info *e)
{
    int64_t missing = p->n_promised + n - p->n_pages;
    if (missing > 0 && add_slab(p, missing, e)) return e->code;
    p->n_promised += n;
    return ERR_NONE;
}

void kv_pool_return(kv_pool *p, int64_t n)
{
    p->n_promised -= n;
    if (p->n_promised == 0 && p->n_used == 0) free_slabs(p);
}

kv_page *kv_page_take(kv_pool *p)
{
    kv_page *page = p->free;
    p->free = page->next;
    page->n_refs = 1;
    page->n_kept = 0;
    p->n_used++;
    return page;
}

static int is_only_kept(const kv_page *page)
{
    return page->n_refs > 0 && page->n_refs == page->n_kept;
}

static void add_refs(kv_pool *p, kv_page *page, int refs, int kept)
{
    p->n_kept -= is_only_kept(page);
    page->n_refs += refs;
    page->n_kept += kept;
    p->n_kept += is_only_kept(page);
    if (page->n_refs > 0) return;
    page->next = p->free;
    p->free = page;
    p->n_used--;
}

void kv_page_share(kv_pool *p, kv_page *page)
{
    add_refs(p, page, 1, 0);
}

void kv_page_drop(kv_pool *p, kv_page *page)
{
    if (page) add_refs(p, page, -1, 0);
}

void kv_page_keep(kv_pool *p, kv_page *page)
{
    add_refs(p, page, 1, 1);
}

void kv_page_let_go(kv_pool *p, kv_page *page)
{
    if (page) add_refs(p, page, -1, -1);
}

void kv_page_own(kv_pool *p, kv_page **page)
{
    kv_page *old = *page;
    if (old && old->n_refs == 1) return;
    *page = kv_page_take(p);
    if (!old) return;
    memcpy((*page)->rows, old->rows, (size_t)p->page_bytes);
    kv_page_drop(p, old);
}

int64_t kv_pool_page_bytes(const kv_pool *p)
{
    return p->page_bytes;
}

int64_t kv_pool_n_used(const kv_pool *p)
{
    return p->n_used;
}

int64_t kv_pool_n_kept(const kv_pool *p)
{
    return p->n_kept;
}
