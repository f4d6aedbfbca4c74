#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "io/gguf.h"
#include "io/imatrix.h"

/* Longest suffix with its NUL. */
enum { SUFFIX_BYTES = sizeof ".in_sum2", TENSORS_PER_ENTRY = 3 };

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const imx_entry *const *)a)->name, (*(const imx_entry *const *)b)->name);
}

static int all_finite(const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(x[i])) return 0;
    return 1;
}

/* What imx_entry says of sums of squares and of counts. */
static int are_possible(const imx_entry *t)
{
    for (int64_t i = 0; i < t->n_values; i++)
        if (t->sums2[i] < 0) return 0;
    for (int64_t i = 0; i < t->n_counts; i++)
        if (t->counts[i] < 1 && t->counts[i] != 0) return 0;
    return 1;
}

/* sorted[n]: in the order of names. */
static err_code check(const char *path, const imx_entry *const *sorted, int64_t n, err_info *e)
{
    for (int64_t i = 0; i < n; i++) {
        const imx_entry *t = sorted[i];
        if (i > 0 && strcmp(sorted[i - 1]->name, t->name) == 0)
            return err_set(e, ERR_RANGE, "%s: entry %s is given twice", path, t->name);
        if (!*t->name) return err_set(e, ERR_RANGE, "%s: an entry has no name", path);
        if (t->n_in < 1 || t->n_counts < 1 || !imx_fits(t, t->n_in, t->n_counts))
            return err_set(e, ERR_RANGE, "%s: entry %s: %lld numbers are not %lld x %lld", path,
                           t->name, (long long)t->n_values, (long long)t->n_in,
                           (long long)t->n_counts);
        if (!all_finite(t->sums2, t->n_values) || !all_finite(t->counts, t->n_counts) ||
            (t->sums && !all_finite(t->sums, t->n_values)))
            return err_set(e, ERR_RANGE, "%s: entry %s has numbers that are not finite", path,
                           t->name);
        if (!are_possible(t))
            return err_set(e, ERR_RANGE, "%s: entry %s has a square below 0, or a count below 1",
                           path, t->name);
    }
    return ERR_NONE;
}

typedef struct lister {
    gguf_out_tensor *tensors;
    int64_t n;
    char *names; /* where the next name goes */
} lister;

static void list_tensor(lister *l, const imx_entry *t, const char *suffix, int64_t n_in,
                        const float *data)
{
    int n = sprintf(l->names, "%s%s", t->name, suffix);
    /* ggml leaves trailing dimensions of 1 out. */
    l->tensors[l->n++] = (gguf_out_tensor){.name = l->names,
                                           .n_dims = t->n_counts > 1 ? 2 : 1,
                                           .dims = {n_in, t->n_counts},
                                           .data = data};
    l->names += n + 1;
}

static err_code write_sorted(const char *path, const imx_entry *const *sorted, int64_t n,
                             const imx_meta *meta, err_info *e)
{
    const char *const type[] = {"imatrix"};
    const gguf_out_value values[] = {
        {"general.type", GGUF_STRING, 0, 1, type},
        {"imatrix.datasets", GGUF_STRING, 1, meta->n_datasets, meta->datasets},
        {"imatrix.chunk_count", GGUF_U32, 0, 1, &meta->chunk_count},
        {"imatrix.chunk_size", GGUF_U32, 0, 1, &meta->chunk_size},
    };
    size_t bytes = 1;
    for (int64_t i = 0; i < n; i++)
        bytes += TENSORS_PER_ENTRY * (strlen(sorted[i]->name) + SUFFIX_BYTES);
    char *names = mem_array(bytes, 1, e);
    gguf_out_tensor *tensors = mem_array((size_t)n * TENSORS_PER_ENTRY, sizeof *tensors, e);
    err_code code = ERR_MEMORY;
    if (names && tensors) {
        lister l = {.tensors = tensors, .names = names};
        for (int64_t i = 0; i < n; i++) {
            const imx_entry *t = sorted[i];
            list_tensor(&l, t, ".in_sum2", t->n_in, t->sums2);
            list_tensor(&l, t, ".counts", 1, t->counts);
            if (t->sums) list_tensor(&l, t, ".in_sum", t->n_in, t->sums);
        }
        code = gguf_write(path, values, sizeof values / sizeof *values, tensors, l.n, e);
    }
    mem_free(tensors);
    mem_free(names);
    return code;
}

err_code imx_write(const char *path, const imx_entry *entries, int64_t n_entries,
                   const imx_meta *meta, err_info *e)
{
    const imx_entry **sorted = mem_array((size_t)n_entries, sizeof *sorted, e);
    if (!sorted) return ERR_MEMORY;
    for (int64_t i = 0; i < n_entries; i++) sorted[i] = &entries[i];
    qsort(sorted, (size_t)n_entries, sizeof *sorted, by_name);
    err_code code = check(path, sorted, n_entries, e);
    if (!code) code = write_sorted(path, sorted, n_entries, meta, e);
    mem_free(sorted);
    return code;
}
