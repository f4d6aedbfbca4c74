#include "text/added.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

static int in_byte_order(const void *left, const void *right)
{
    const added_token *a = left, *b = right;
    int by_bytes = memcmp(a->bytes, b->bytes, a->n < b->n ? a->n : b->n);
    return by_bytes ? by_bytes : (a->n > b->n) - (a->n < b->n);
}

err_code added_init(added *a, const vocab *v, err_info *e)
{
    size_t n = 0;
    for (int32_t id = 0; id < v->n; id++) n += (v->entries[id].flags & VOCAB_ADDED) != 0;
    a->tokens = mem_array(n, sizeof *a->tokens, e);
    if (!a->tokens) return ERR_MEMORY;
    for (int32_t id = 0; id < v->n; id++) {
        if (!(v->entries[id].flags & VOCAB_ADDED)) continue;
        added_token *t = &a->tokens[a->n++];
        t->bytes = vocab_bytes(v, id, &t->n);
        t->id = id;
        t->stage = v->entries[id].flags & VOCAB_NORMALIZED ? ADDED_NORMALIZED : ADDED_RAW;
        a->leads[(uint8_t)t->bytes[0]] |= (uint8_t)t->stage;
        a->stages |= (int)t->stage;
    }
    qsort(a->tokens, a->n, sizeof *a->tokens, in_byte_order);
    return ERR_NONE;
}

void added_free(added *a)
{
    mem_free(a->tokens);
    *a = (added){0};
}

/* First of tokens[lo, hi), all longer than k and equal before byte k, whose byte k is >= c. */
static size_t lower_bound(const added *a, size_t lo, size_t hi, size_t k, int c)
{
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if ((uint8_t)a->tokens[mid].bytes[k] < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

int32_t added_at(const added *a, added_stage stage, const char *s, size_t n, size_t *len)
{
    size_t lo = 0, hi = a->n;
    int32_t id = -1;
    for (size_t k = 0; k < n && lo < hi; k++) {
        int c = (uint8_t)s[k];
        lo = lower_bound(a, lo, hi, k, c);
        hi = lower_bound(a, lo, hi, k, c + 1);
        if (lo < hi && a->tokens[lo].n == k + 1) {
            const added_token *t = &a->tokens[lo++];
            if (!(t->stage & stage)) continue;
            id = t->id;
            *len = k + 1;
        }
    }
    return id;
}

int32_t added_find(const added *a, added_stage stage, const char *s, size_t n, size_t *at,
                   size_t *len)
{
    for (size_t i = 0; i < n; i++) {
        if (!(a->leads[(uint8_t)s[i]] & stage)) continue;
        int32_t id = added_at(a, stage, s + i, n - i, len);
        if (id < 0) continue;
        *at = i;
        return id;
    }
    return -1;
}
