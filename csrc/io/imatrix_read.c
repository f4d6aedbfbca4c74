#include <stdint.h>
#include <string.h>

#include "base/map.h"
#include "base/mem.h"
#include "io/imatrix_set.h"

/* ---- GGUF ------------------------------------------------------------------------------- */

/* The length of `name` without the suffix; 0 when it does not end so. */
static size_t stem(const char *name, const char *suffix)
{
    size_t n = strlen(name), m = strlen(suffix);
    return n > m && strcmp(name + n - m, suffix) == 0 ? n - m : 0;
}

/* The tensor <stem><suffix>, or NULL. */
static const gguf_tensor *sibling(const gguf_file *f, const char *name, size_t n,
                                  const char *suffix)
{
    char wanted[512];
    size_t m = strlen(suffix);
    if (n + m >= sizeof wanted) return NULL;
    memcpy(wanted, name, n);
    memcpy(wanted + n, suffix, m + 1);
    return gguf_find_tensor(f, wanted);
}

/* The tensor's floats: in the file where they are aligned, else in *owned. */
static const float *floats_of(const gguf_tensor *t, float **owned, err_info *e)
{
    if (t->type != GGUF_TYPE_F32) {
        err_set(e, ERR_UNSUPPORTED, "tensor %s is not F32", t->name);
        return NULL;
    }
    if ((uintptr_t)t->data % _Alignof(float) == 0) return (const float *)(const void *)t->data;
    *owned = mem_array((size_t)t->n_elements, sizeof **owned, e);
    if (*owned) memcpy(*owned, t->data, (size_t)t->n_bytes);
    return *owned;
}

static err_code read_entry(imx_set *set, const gguf_file *f, const gguf_tensor *sums2, size_t n,
                           err_info *e)
{
    const gguf_tensor *counts = sibling(f, sums2->name, n, ".counts");
    const gguf_tensor *sums = sibling(f, sums2->name, n, ".in_sum");
    if (!counts) return err_set(e, ERR_FORMAT, "entry %.*s has no counts", (int)n, sums2->name);
    if (sums && sums->n_elements != sums2->n_elements)
        return err_set(e, ERR_FORMAT, "entry %.*s: %lld numbers in in_sum, %lld in in_sum2", (int)n,
                       sums2->name, (long long)sums->n_elements, (long long)sums2->n_elements);
    int64_t n_in = sums2->dims[0], n_mat = n_in ? sums2->n_elements / n_in : 0;
    if (n_mat < 1 || (counts->n_elements != 1 && counts->n_elements != n_mat))
        return err_set(e, ERR_FORMAT, "entry %.*s: %lld inputs, %lld matrices, %lld counts", (int)n,
                       sums2->name, (long long)n_in, (long long)n_mat,
                       (long long)counts->n_elements);
    imx_item *t = imx_add(set, sums2->name, n, e);
    if (!t) return ERR_MEMORY;
    t->e.n_in = n_in;
    t->e.n_values = sums2->n_elements;
    t->e.n_counts = counts->n_elements;
    t->e.sums2 = floats_of(sums2, &t->owned[0], e);
    t->e.counts = t->e.sums2 ? floats_of(counts, &t->owned[1], e) : NULL;
    if (!t->e.counts) return e->code;
    if (sums) t->e.sums = floats_of(sums, &t->owned[2], e);
    return sums && !t->e.sums ? e->code : ERR_NONE;
}

/* A count or sum whose in_sum2 is missing is half an entry. */
static err_code check_orphan(const gguf_file *f, const gguf_tensor *t, err_info *e)
{
    size_t n = stem(t->name, ".counts");
    if (!n) n = stem(t->name, ".in_sum");
    if (!n || sibling(f, t->name, n, ".in_sum2")) return ERR_NONE;
    return err_set(e, ERR_FORMAT, "entry %.*s has no in_sum2", (int)n, t->name);
}

typedef struct dataset_sink {
    imx_set *set;
    err_info *e;
} dataset_sink;

static int add_dataset(void *ctx, const char *s, size_t n_bytes)
{
    const dataset_sink *sink = ctx;
    return (int)imx_add_dataset(sink->set, s, n_bytes, sink->e);
}

static err_code read_entries(imx_set *set, const gguf_file *f, err_info *e)
{
    if (!gguf_is_string(gguf_find(f, "general.type"), "imatrix"))
        return err_set(e, ERR_FORMAT, "not an imatrix: general.type says otherwise");
    dataset_sink sink = {set, e};
    if (gguf_each_string(gguf_find(f, "imatrix.datasets"), add_dataset, &sink) > 0) return e->code;
    set->chunk_count = gguf_int(gguf_find(f, "imatrix.chunk_count"), 0, 0);
    set->chunk_size = gguf_int(gguf_find(f, "imatrix.chunk_size"), 0, 0);
    for (int64_t i = 0; i < gguf_n_tensors(f); i++) {
        const gguf_tensor *t = gguf_tensor_at(f, i);
        size_t n = stem(t->name, ".in_sum2");
        if (n ? read_entry(set, f, t, n, e) : check_orphan(f, t, e)) return e->code;
    }
    return set->n ? ERR_NONE : err_set(e, ERR_FORMAT, "an imatrix without entries");
}

err_code imx_read_gguf(imx_set *set, const char *path, err_info *e)
{
    gguf_file *f = gguf_open(path, e);
    if (!f) return e->code;
    set->files[set->n_files++] = f;
    return read_entries(set, f, e) ? err_prefix(e, "%s", path) : ERR_NONE;
}

/* ---- .dat ------------------------------------------------------------------------------- */

/* Sums are divided by counts and multiplied by chunks there, and the chunk's size is not said;
 * llama.cpp takes that of the run that reads, which is 512 unless told otherwise. It matters only
 * to sums over several files, and cancels in every mean. */
enum { DAT_CHUNK = 512, DAT_NAME_LIMIT = 255 };

typedef struct dat {
    map_file map;
    int64_t at;
    const char *path;
    err_info *e;
} dat;

static err_code dat_int(dat *d, int32_t *out, const char *what)
{
    if ((int64_t)d->map.n_bytes - d->at < 4)
        return err_set(d->e, ERR_FORMAT, "%s: byte %lld: the file ends inside %s", d->path,
                       (long long)d->at, what);
    memcpy(out, d->map.data + d->at, 4);
    d->at += 4;
    return ERR_NONE;
}

/* The bytes that an i32 announces. */
static err_code dat_name(dat *d, const char **name, int32_t *n, const char *what)
{
    if (dat_int(d, n, what)) return d->e->code;
    if (*n < 0 || *n > (int64_t)d->map.n_bytes - d->at)
        return err_set(d->e, ERR_FORMAT, "%s: byte %lld: %s has %d bytes, %lld follow", d->path,
                       (long long)d->at - 4, what, *n, (long long)d->map.n_bytes - d->at);
    *name = (const char *)d->map.data + d->at;
    d->at += *n;
    return ERR_NONE;
}

static int is_plain(const char *s, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f) return 0;
    return n > 0 && n <= DAT_NAME_LIMIT;
}

static err_code dat_entry(imx_set *set, dat *d)
{
    const char *name = NULL;
    int64_t start = d->at;
    int32_t n = 0, n_calls = 0, n_values = 0;
    if (dat_name(d, &name, &n, "the name of an entry")) return d->e->code;
    if (!is_plain(name, n))
        return err_set(d->e, ERR_FORMAT, "%s: byte %lld: not the name of an entry%s", d->path,
                       (long long)start, set->n ? "" : " (no imatrix?)");
    imx_item *t = imx_add(set, name, (size_t)n, d->e);
    if (!t) return ERR_MEMORY;
    t->is_dat = 1;
    if (dat_int(d, &n_calls, "a number of calls") || dat_int(d, &n_values, "a number of values"))
        return d->e->code;
    if (n_values < 1 || n_values > ((int64_t)d->map.n_bytes - d->at) / 4)
        return err_set(d->e, ERR_FORMAT, "%s: entry %s: %d values, %lld bytes follow", d->path,
                       t->name, n_values, (long long)d->map.n_bytes - d->at);
    t->owned[0] = mem_array((size_t)n_values, sizeof(float), d->e);
    t->owned[1] = mem_array(1, sizeof(float), d->e);
    if (!t->owned[0] || !t->owned[1]) return ERR_MEMORY;
    memcpy(t->owned[0], d->map.data + d->at, (size_t)n_values * 4);
    d->at += (int64_t)n_values * 4;
    for (int32_t i = 0; i < n_values; i++) t->owned[0][i] *= DAT_CHUNK;
    t->owned[1][0] = (float)(n_calls > 0 ? n_calls : 1) * DAT_CHUNK;
    t->e = (imx_entry){.name = t->name,
                       .n_values = n_values,
                       .n_counts = 1,
                       .sums2 = t->owned[0],
                       .counts = t->owned[1]};
    return ERR_NONE;
}

/* Files have grown at the end: nothing, the last chunk's number, a data set's name behind it. */
static err_code dat_trailer(imx_set *set, dat *d)
{
    const char *name = NULL;
    int32_t chunks = 0, n = 0;
    if (d->at == (int64_t)d->map.n_bytes) return ERR_NONE;
    if (dat_int(d, &chunks, "the number of chunks")) return d->e->code;
    set->chunk_count = chunks > 0 ? chunks : 0;
    if (d->at == (int64_t)d->map.n_bytes) return ERR_NONE;
    if (dat_name(d, &name, &n, "the name of the data set")) return d->e->code;
    if (d->at != (int64_t)d->map.n_bytes)
        return err_set(d->e, ERR_FORMAT, "%s: byte %lld: bytes behind the end", d->path,
                       (long long)d->at);
    return n ? imx_add_dataset(set, name, (size_t)n, d->e) : ERR_NONE;
}

static err_code dat_entries(imx_set *set, dat *d)
{
    int32_t n = 0;
    if (dat_int(d, &n, "the number of entries")) return d->e->code;
    if (n < 1 || n > (int64_t)d->map.n_bytes / 16)
        return err_set(d->e, ERR_FORMAT, "%s: not an imatrix: neither GGUF nor .dat", d->path);
    for (int32_t i = 0; i < n; i++)
        if (dat_entry(set, d)) return d->e->code;
    return dat_trailer(set, d);
}

err_code imx_read_dat(imx_set *set, const char *path, err_info *e)
{
    dat d = {.path = path, .e = e};
    if (map_open(&d.map, path, e)) return e->code;
    err_code code = dat_entries(set, &d);
    map_close(&d.map);
    return code;
}
