#include "io/imatrix.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "io/imatrix_set.h"

/* ---- numbers ---------------------------------------------------------------------------- */

static err_code check_numbers(const imx_item *t, const char *what, const float *x, int64_t n,
                              float least, err_info *e)
{
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(x[i]) || x[i] < least)
            return err_set(e, ERR_FORMAT, "entry %s: number %lld of %s is %g", t->e.name,
                           (long long)i, what, (double)x[i]);
    return ERR_NONE;
}

err_code imx_check(const imx_item *t, err_info *e)
{
    const imx_entry *x = &t->e;
    for (int64_t i = 0; i < x->n_counts; i++)
        if (x->counts[i] > 0 && x->counts[i] < 1)
            return err_set(e, ERR_FORMAT, "entry %s: count %lld is %g", x->name, (long long)i,
                           (double)x->counts[i]);
    if (check_numbers(t, "in_sum2", x->sums2, x->n_values, 0, e) ||
        check_numbers(t, "counts", x->counts, x->n_counts, 0, e) ||
        (x->sums && check_numbers(t, "in_sum", x->sums, x->n_values, -INFINITY, e)))
        return e->code;
    return ERR_NONE;
}

/* ---- sets ------------------------------------------------------------------------------- */

void imx_item_free(imx_item *t)
{
    for (int i = 0; i < 3; i++) mem_free(t->owned[i]);
    mem_free(t->name);
    *t = (imx_item){0};
}

imx_item *imx_add(imx_set *set, const char *name, size_t n_bytes, err_info *e)
{
    if (set->n == set->room) {
        int64_t room = 2 * set->room + 64;
        imx_item *items = mem_array((size_t)room, sizeof *items, e);
        if (!items) return NULL;
        if (set->n) memcpy(items, set->items, (size_t)set->n * sizeof *items);
        mem_free(set->items);
        set->items = items;
        set->room = room;
    }
    char *copy = mem_copy(name, n_bytes, e);
    if (!copy) return NULL;
    imx_item *t = &set->items[set->n++];
    *t = (imx_item){.e.name = copy, .name = copy};
    return t;
}

err_code imx_add_dataset(imx_set *set, const char *name, size_t n_bytes, err_info *e)
{
    if (set->n_datasets == set->room_datasets) {
        int64_t room = 2 * set->room_datasets + 4;
        char **names = mem_array((size_t)room, sizeof *names, e);
        if (!names) return ERR_MEMORY;
        if (set->n_datasets) memcpy(names, set->datasets, (size_t)set->n_datasets * sizeof *names);
        mem_free(set->datasets);
        set->datasets = names;
        set->room_datasets = room;
    }
    char *copy = mem_copy(name, n_bytes, e);
    if (!copy) return ERR_MEMORY;
    set->datasets[set->n_datasets++] = copy;
    return ERR_NONE;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const imx_item *)a)->e.name, ((const imx_item *)b)->e.name);
}

err_code imx_sort(imx_set *set, err_info *e)
{
    qsort(set->items, (size_t)set->n, sizeof *set->items, by_name);
    for (int64_t i = 1; i < set->n; i++)
        if (by_name(&set->items[i - 1], &set->items[i]) == 0)
            return err_set(e, ERR_FORMAT, "entry %s is there twice", set->items[i].name);
    return ERR_NONE;
}

int64_t imx_count(const imx_set *set)
{
    return set->n;
}

const imx_entry *imx_at(const imx_set *set, int64_t i)
{
    return i >= 0 && i < set->n ? &set->items[i].e : NULL;
}

const imx_entry *imx_find(const imx_set *set, const char *name)
{
    imx_item key = {.e.name = name};
    const imx_item *t = bsearch(&key, set->items, (size_t)set->n, sizeof key, by_name);
    return t ? &t->e : NULL;
}

int64_t imx_n_datasets(const imx_set *set)
{
    return set->n_datasets;
}

const char *imx_dataset(const imx_set *set, int64_t i)
{
    return i >= 0 && i < set->n_datasets ? set->datasets[i] : NULL;
}

int64_t imx_chunk_count(const imx_set *set)
{
    return set->chunk_count;
}

int64_t imx_chunk_size(const imx_set *set)
{
    return set->chunk_size;
}

void imx_close(imx_set *set)
{
    if (!set) return;
    for (int64_t i = 0; i < set->n; i++) imx_item_free(&set->items[i]);
    for (int64_t i = 0; i < set->n_datasets; i++) mem_free(set->datasets[i]);
    for (int64_t i = 0; i < set->n_files; i++) gguf_close(set->files[i]);
    mem_free(set->items);
    mem_free(set->datasets);
    mem_free(set->files);
    mem_free(set);
}

/* ---- several files ---------------------------------------------------------------------- */

/* x[nx] + y[ny] in a new array of max(nx, ny); one element holds for all. */
static float *sum_of(const float *x, int64_t nx, const float *y, int64_t ny, err_info *e)
{
    int64_t n = nx > ny ? nx : ny;
    float *out = mem_array((size_t)n, sizeof *out, e);
    for (int64_t i = 0; out && i < n; i++) out[i] = x[nx == 1 ? 0 : i] + y[ny == 1 ? 0 : i];
    return out;
}

static err_code add_item(imx_item *t, const imx_item *u, err_info *e)
{
    imx_entry *a = &t->e;
    const imx_entry *b = &u->e;
    if (a->n_values != b->n_values || (a->n_in && b->n_in && a->n_in != b->n_in))
        return err_set(e, ERR_FORMAT, "entry %s: %lld numbers, %lld in the files before", a->name,
                       (long long)b->n_values, (long long)a->n_values);
    if (a->n_counts != b->n_counts && a->n_counts != 1 && b->n_counts != 1)
        return err_set(e, ERR_FORMAT, "entry %s: %lld counts, %lld in the files before", a->name,
                       (long long)b->n_counts, (long long)a->n_counts);
    imx_item sum = {.e = *a, .name = t->name, .is_dat = t->is_dat && u->is_dat};
    sum.e.n_counts = a->n_counts > b->n_counts ? a->n_counts : b->n_counts;
    sum.e.n_in = a->n_in ? a->n_in : b->n_in;
    int has_sums = a->sums && b->sums;
    sum.e.sums2 = sum.owned[0] = sum_of(a->sums2, a->n_values, b->sums2, b->n_values, e);
    sum.e.counts = sum.owned[1] = sum_of(a->counts, a->n_counts, b->counts, b->n_counts, e);
    if (has_sums) sum.owned[2] = sum_of(a->sums, a->n_values, b->sums, b->n_values, e);
    sum.e.sums = sum.owned[2];
    for (int i = 0; i < 3; i++) mem_free(t->owned[i]);
    *t = sum; /* also when memory ran out: what there is is owned */
    if (!sum.e.sums2 || !sum.e.counts || (has_sums && !sum.e.sums)) return ERR_MEMORY;
    return imx_check(t, e);
}

/* Moves everything of b into a; b is left with what a does not need. */
static err_code merge(imx_set *a, imx_set *b, err_info *e)
{
    int64_t n = a->n;
    for (int64_t i = 0; i < b->n; i++) {
        imx_item *u = &b->items[i];
        imx_item *t = bsearch(u, a->items, (size_t)n, sizeof *t, by_name);
        if (t) {
            if (add_item(t, u, e)) return e->code;
            continue;
        }
        t = imx_add(a, u->name, strlen(u->name), e);
        if (!t) return ERR_MEMORY;
        mem_free(u->name);
        u->name = t->name;
        u->e.name = t->name;
        *t = *u;
        *u = (imx_item){0};
    }
    for (int64_t i = 0; i < b->n_datasets; i++)
        if (imx_add_dataset(a, b->datasets[i], strlen(b->datasets[i]), e)) return e->code;
    a->chunk_count += b->chunk_count;
    for (int64_t i = 0; i < b->n_files; i++) a->files[a->n_files++] = b->files[i];
    b->n_files = 0;
    return imx_sort(a, e);
}

static imx_set *open_one(const char *path, int64_t room_files, err_info *e)
{
    imx_set *set = mem_array(1, sizeof *set, e);
    if (!set) return NULL;
    set->files = mem_array((size_t)room_files, sizeof *set->files, e);
    if (!set->files) {
        imx_close(set);
        return NULL;
    }
    err_code code = gguf_is(path) ? imx_read_gguf(set, path, e) : imx_read_dat(set, path, e);
    if (!code) code = imx_sort(set, e) ? err_prefix(e, "%s", path) : ERR_NONE;
    for (int64_t i = 0; i < set->n && !code; i++)
        code = imx_check(&set->items[i], e) ? err_prefix(e, "%s", path) : ERR_NONE;
    if (!code) return set;
    imx_close(set);
    return NULL;
}

imx_set *imx_open(const char *const *paths, int64_t n_paths, err_info *e)
{
    err_info own = {0};
    if (!e) e = &own;
    if (n_paths < 1) {
        err_set(e, ERR_RANGE, "no imatrix file is given");
        return NULL;
    }
    imx_set *set = open_one(paths[0], n_paths, e);
    for (int64_t i = 1; i < n_paths && set; i++) {
        imx_set *more = open_one(paths[i], n_paths, e);
        if (!more || merge(set, more, e)) {
            if (more) err_prefix(e, "%s", paths[i]);
            imx_close(set);
            set = NULL;
        }
        imx_close(more);
    }
    return set;
}

/* ---- means ------------------------------------------------------------------------------ */

int imx_fits(const imx_entry *t, int64_t n_in, int64_t n_mat)
{
    int64_t n;
    return n_in > 0 && n_mat > 0 && !__builtin_mul_overflow(n_in, n_mat, &n) && n == t->n_values &&
           (t->n_in == 0 || t->n_in == n_in) && (t->n_counts == 1 || t->n_counts == n_mat);
}

/* Tokens that matrix `mat` met. */
static double tokens_of(const imx_item *t, int64_t n_in, int64_t n_mat, int64_t mat)
{
    float count = t->e.counts[t->e.n_counts == 1 ? 0 : mat];
    if (!t->is_dat || n_mat == 1) return count;
    for (int64_t i = 0; i < n_in; i++)
        if (t->e.sums2[mat * n_in + i] != count) return count;
    return 0;
}

double imx_tokens(const imx_entry *entry, int64_t n_mat, int64_t mat)
{
    return tokens_of((const imx_item *)entry, entry->n_values / n_mat, n_mat, mat);
}

double imx_mean_squares(const imx_entry *entry, int64_t n_mat, int64_t mat, float *out)
{
    const imx_item *t = (const imx_item *)entry;
    int64_t n_in = entry->n_values / n_mat;
    double n = mat < 0 ? 0 : tokens_of(t, n_in, n_mat, mat), all = 0;
    if (n > 0) {
        for (int64_t i = 0; i < n_in; i++) out[i] = (float)(entry->sums2[mat * n_in + i] / n);
        return n;
    }
    memset(out, 0, (size_t)n_in * sizeof *out);
    for (int64_t m = 0; m < n_mat; m++) all += tokens_of(t, n_in, n_mat, m);
    if (all == 0) return -1;
    for (int64_t m = 0; m < n_mat; m++)
        if (tokens_of(t, n_in, n_mat, m) > 0)
            for (int64_t i = 0; i < n_in; i++) out[i] += (float)(entry->sums2[m * n_in + i] / all);
    return mat < 0 ? all : 0;
}

void imx_order_heads(const float *x, int64_t key_heads, int64_t per_key, int64_t dim, int to_file,
                     float *out)
{
    for (int64_t k = 0; k < key_heads; k++)
        for (int64_t r = 0; r < per_key; r++) {
            int64_t grouped = (k * per_key + r) * dim, tiled = (r * key_heads + k) * dim;
            int64_t from = to_file ? grouped : tiled, to = to_file ? tiled : grouped;
            memcpy(out + to, x + from, (size_t)dim * sizeof *out);
        }
}
