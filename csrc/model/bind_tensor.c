/* One tensor at a time: found by name, marked as used, checked, and vectors widened. */
#include "model/bind.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"

/* ---- arena ---------------------------------------------------------------------------------- */

struct bind_arena {
    bind_arena *next;
    void *data;
};

void *bind_alloc(binder *b, size_t n, size_t size)
{
    bind_arena *a = mem_array(1, sizeof *a, b->e);
    if (!a) return NULL;
    a->data = mem_array(n, size, b->e);
    if (!a->data) {
        mem_free(a);
        return NULL;
    }
    a->next = b->arena;
    b->arena = a;
    return a->data;
}

void bind_arena_free(bind_arena *a)
{
    while (a) {
        bind_arena *next = a->next;
        mem_free(a->data);
        mem_free(a);
        a = next;
    }
}

/* ---- names ---------------------------------------------------------------------------------- */

void bind_join(char *out, const char *a, const char *c)
{
    size_t n = strnlen(a, BIND_NAME - 1);
    size_t more = strnlen(c, BIND_NAME - 1 - n);
    memmove(out, a, n);
    memcpy(out + n, c, more);
    out[n + more] = 0;
}

/* Position in the sorted table, or -1: the table of used tensors needs a number. */
static int64_t find_index(const binder *b, const char *module, const char *suffix)
{
    char name[BIND_NAME];
    bind_join(name, module, suffix);
    int64_t lo = 0, hi = st_count(b->set);
    while (lo < hi) {
        int64_t mid = lo + (hi - lo) / 2;
        int order = strcmp(st_at(b->set, mid)->name, name);
        if (order == 0) return mid;
        if (order < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return -1;
}

const st_tensor *bind_find(binder *b, const char *module, const char *suffix)
{
    int64_t i = find_index(b, module, suffix);
    if (i < 0) return NULL;
    b->used[i] = 1;
    return st_at(b->set, i);
}

int bind_has(const binder *b, const char *module, const char *suffix)
{
    return find_index(b, module, suffix) >= 0;
}

err_code bind_missing(binder *b, const char *module, const char *suffix)
{
    return err_set(b->e, ERR_FORMAT, "tensor %s%s is missing", module, suffix);
}

/* ---- shapes and types ----------------------------------------------------------------------- */

static void shape_text(char *out, size_t n_bytes, int n_dims, const int64_t *dims)
{
    size_t at = (size_t)snprintf(out, n_bytes, "[");
    for (int i = 0; i < n_dims && at + 24 < n_bytes; i++)
        at += (size_t)snprintf(out + at, n_bytes - at, "%s%lld", i ? ", " : "", (long long)dims[i]);
    snprintf(out + at, n_bytes - at, "]");
}

err_code bind_shape(binder *b, const st_tensor *t, int n_dims, const int64_t *dims)
{
    if (t->n_dims == n_dims && memcmp(t->shape, dims, (size_t)n_dims * sizeof *dims) == 0)
        return ERR_NONE;
    char found[128], expected[128];
    shape_text(found, sizeof found, t->n_dims, t->shape);
    shape_text(expected, sizeof expected, n_dims, dims);
    return err_set(b->e, ERR_FORMAT, "tensor %s: shape %s, expected %s", t->name, found, expected);
}

err_code bind_wrong_dtype(binder *b, const st_tensor *t, const char *expected)
{
    return err_set(b->e, ERR_FORMAT, "tensor %s: dtype %s, expected %s", t->name,
                   st_dtype_name(t->dtype), expected);
}

int bind_code_bits(int64_t words, int64_t cols)
{
    if (words < 1 || words > cols || words * 32 % cols) return 0;
    return (int)(words * 32 / cols);
}

int bind_float(st_dtype dtype)
{
    switch (dtype) {
    case ST_F32: return NUM_DT_F32;
    case ST_F16: return NUM_DT_F16;
    case ST_BF16: return NUM_DT_BF16;
    default: return -1;
    }
}

float bind_float_at(const st_tensor *t, int64_t i)
{
    return num_element(t->data, (num_dtype)bind_float(t->dtype), i);
}

err_code bind_vector(binder *b, const char *name, int n_dims, const int64_t *dims, float add,
                     const float **out)
{
    const st_tensor *t = bind_find(b, name, "");
    if (!t) return bind_missing(b, name, "");
    if (bind_float(t->dtype) < 0) return bind_wrong_dtype(b, t, "F32, F16 or BF16");
    if (bind_shape(b, t, n_dims, dims)) return b->e->code;
    int64_t n = st_elements(t);
    float *v = bind_alloc(b, (size_t)n, sizeof *v);
    if (!v) return ERR_MEMORY;
    for (int64_t i = 0; i < n; i++) {
        float x = bind_float_at(t, i);
        if (!isfinite(x))
            return err_set(b->e, ERR_FORMAT, "tensor %s: element %lld is not finite", name,
                           (long long)i);
        v[i] = add + x;
    }
    *out = v;
    return ERR_NONE;
}
