#include "text/bpe.h"

#include <string.h>

#include "base/mem.h"

err_code bpe_init(bpe *b, size_t n_merges, err_info *e)
{
    size_t n_slots = 16;
    while (n_slots < 2 * n_merges) n_slots *= 2;
    b->slots = mem_array(n_slots, sizeof *b->slots, e);
    if (!b->slots) return ERR_MEMORY;
    memset(b->slots, 0xff, n_slots * sizeof *b->slots);
    b->mask = (uint32_t)(n_slots - 1);
    return ERR_NONE;
}

void bpe_free(bpe *b)
{
    mem_free(b->slots);
    *b = (bpe){0};
}

static bpe_merge *find_merge(const bpe *b, int32_t left, int32_t right)
{
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    uint64_t h = pair * UINT64_C(0x9e3779b97f4a7c15);
    uint32_t slot = (uint32_t)(h >> 32) & b->mask;
    while (b->slots[slot].pair != pair && b->slots[slot].pair != UINT64_MAX)
        slot = (slot + 1) & b->mask;
    return &b->slots[slot];
}

void bpe_add(bpe *b, int32_t left, int32_t right, uint32_t rank, int32_t id)
{
    bpe_merge *m = find_merge(b, left, right);
    m->pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    m->rank = rank;
    m->id = id;
}

void bpe_work_free(bpe_work *w)
{
    buf_free(&w->parts);
    buf_free(&w->heap);
}

/* Parts of a piece: a doubly linked list over an array, so that positions keep their order. */
typedef struct part {
    int32_t id; /* -1: swallowed by the part before it */
    uint32_t prev, next;
} part;

enum { NO_PART = -1 };
#define END UINT32_MAX

typedef struct candidate {
    uint64_t order; /* rank << 32 | position: lowest rank first, then leftmost */
    int32_t id;
} candidate;

static void sift_down(candidate *heap, size_t n, size_t i)
{
    candidate c = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1].order < heap[child].order) child++;
        if (heap[child].order >= c.order) break;
        heap[i] = heap[child];
    }
    heap[i] = c;
}

static err_code push(buf *b, candidate c, err_info *e)
{
    err_code code = buf_reserve(b, sizeof c, e);
    if (code) return code;
    candidate *heap = b->data;
    size_t i = b->n / sizeof c;
    for (; i > 0 && heap[(i - 1) / 2].order > c.order; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = c;
    b->n += sizeof c;
    return ERR_NONE;
}

static candidate pop(buf *b)
{
    candidate *heap = b->data, top = heap[0];
    b->n -= sizeof top;
    size_t n = b->n / sizeof top;
    if (n) {
        heap[0] = heap[n];
        sift_down(heap, n, 0);
    }
    return top;
}

/* Pushes the merge of parts i and i + 1 (in list order), if there is one. */
static err_code push_pair(const bpe *b, const part *parts, uint32_t i, buf *heap, err_info *e)
{
    if (i == END || parts[i].next == END) return ERR_NONE;
    const bpe_merge *m = find_merge(b, parts[i].id, parts[parts[i].next].id);
    if (m->pair == UINT64_MAX) return ERR_NONE;
    return push(heap, (candidate){(uint64_t)m->rank << 32 | i, m->id}, e);
}

/* A candidate is stale when its parts have changed since. Compared by result, not by rank, as
 * Hugging Face tokenizers does (models/bpe/word.rs, merge_all). */
static int still_there(const bpe *b, const part *parts, uint32_t i, int32_t id)
{
    if (parts[i].id == NO_PART || parts[i].next == END) return 0;
    const bpe_merge *m = find_merge(b, parts[i].id, parts[parts[i].next].id);
    return m->pair != UINT64_MAX && m->id == id;
}

static err_code merge_all(const bpe *b, part *parts, buf *heap, err_info *e)
{
    err_code c = ERR_NONE;
    while (heap->n && !c) {
        candidate top = pop(heap);
        uint32_t i = (uint32_t)top.order;
        if (!still_there(b, parts, i, top.id)) continue;
        part *p = &parts[i], *right = &parts[p->next];
        p->id = top.id;
        p->next = right->next;
        right->id = NO_PART;
        if (p->next != END) parts[p->next].prev = i;
        c = push_pair(b, parts, p->prev, heap, e);
        if (!c) c = push_pair(b, parts, i, heap, e);
    }
    return c;
}

err_code bpe_encode(const bpe *b, const vocab *v, const char *piece, size_t n, bpe_work *w,
                    buf *ids, err_info *e)
{
    w->parts.n = w->heap.n = 0;
    err_code c = buf_reserve(&w->parts, n * sizeof(part), e);
    if (c) return c;
    part *parts = w->parts.data;
    uint32_t m = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = v->byte_ids[(uint8_t)piece[i]];
        if (id < 0) continue;
        parts[m] = (part){id, m - 1, m + 1};
        m++;
    }
    if (m) parts[m - 1].next = END;
    for (uint32_t i = 0; i + 1 < m && !c; i++) c = push_pair(b, parts, i, &w->heap, e);
    if (!c) c = merge_all(b, parts, &w->heap, e);
    if (!c) c = buf_reserve(ids, n * sizeof(int32_t), e);
    if (c) return c;
    int32_t *to = (int32_t *)((char *)ids->data + ids->n);
    for (uint32_t i = 0; i < m; i = parts[i].next) {
        *to++ = parts[i].id;
        ids->n += sizeof *to;
    }
    return ERR_NONE;
}
