#include "text/buf.h"

#include <string.h>

#include "base/mem.h"

err_code buf_reserve(buf *b, size_t more, err_info *e)
{
    if (more <= b->cap - b->n) return ERR_NONE;
    size_t want;
    if (__builtin_add_overflow(b->n, more, &want)) want = (size_t)-1;
    size_t cap = b->cap > (size_t)-1 / 2 || want > b->cap * 2 ? want : b->cap * 2;
    char *data = mem_array(cap, 1, e);
    if (!data) return ERR_MEMORY;
    if (b->n) memcpy(data, b->data, b->n);
    mem_free(b->data);
    b->data = data;
    b->cap = cap;
    return ERR_NONE;
}

err_code buf_append(buf *b, const void *bytes, size_t n, err_info *e)
{
    err_code c = buf_reserve(b, n, e);
    if (c) return c;
    if (n) memcpy((char *)b->data + b->n, bytes, n);
    b->n += n;
    return ERR_NONE;
}

void buf_free(buf *b)
{
    mem_free(b->data);
    *b = (buf){0};
}
