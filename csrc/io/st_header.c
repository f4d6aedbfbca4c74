#include "io/st_header.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "io/json.h"

/* The header is {name: {dtype, shape: [...], data_offsets: [a, b]}}; anything deeper is wrong
 * anyway and gets a better error from the checks below. */
enum { HEADER_DEPTH = 16 };

typedef struct reader {
    st_header *h;
    const map_file *m;
    const char *path;
    int64_t data_at; /* where tensor data begins in the file */
    size_t names_used, metadata_used;
    err_info *e;
} reader;

int st_plain_name(const char *s)
{
    if (!*s) return 0;
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7f) return 0;
    return 1;
}

int st_shape_bytes(st_dtype dtype, int n_dims, const int64_t *shape, int64_t *n_bytes)
{
    int64_t n = st_dtype_bytes(dtype);
    for (int i = 0; i < n_dims; i++)
        if (shape[i] < 0 || __builtin_mul_overflow(n, shape[i], &n)) return 0;
    *n_bytes = n;
    return 1;
}

static err_code read_shape(st_tensor *t, const json_value *shape, err_info *e)
{
    size_t n = json_length(shape);
    if (json_type_of(shape) != JSON_ARRAY) return err_set(e, ERR_FORMAT, "shape is not an array");
    if (n > ST_MAX_DIMS)
        return err_set(e, ERR_UNSUPPORTED, "%zu dimensions, more than %d", n, ST_MAX_DIMS);
    t->n_dims = (int)n;
    for (size_t i = 0; i < n; i++) {
        t->shape[i] = json_int(json_at(shape, i), -1);
        if (t->shape[i] < 0)
            return err_set(e, ERR_FORMAT, "dimension %zu of shape is not a size", i);
    }
    if (!st_shape_bytes(t->dtype, t->n_dims, t->shape, &t->n_bytes))
        return err_set(e, ERR_FORMAT, "shape has more than 2^63 bytes");
    return ERR_NONE;
}

static err_code read_dtype(st_tensor *t, const json_value *dtype, err_info *e)
{
    const char *name = json_string(dtype, NULL);
    if (!name) return err_set(e, ERR_FORMAT, "dtype is not a string");
    int d = st_dtype_parse(name);
    if (d < 0)
        return err_set(e, ERR_UNSUPPORTED, "unknown dtype \"%.20s\"",
                       st_plain_name(name) ? name : "");
    t->dtype = (st_dtype)d;
    return ERR_NONE;
}

static err_code read_place(const reader *r, st_tensor *t, const json_value *offsets)
{
    int64_t begin = json_int(json_at(offsets, 0), -1), end = json_int(json_at(offsets, 1), -1);
    int64_t room = (int64_t)r->m->n_bytes - r->data_at;
    if (json_length(offsets) != 2 || begin < 0 || end < begin)
        return err_set(r->e, ERR_FORMAT, "data_offsets is not a pair of ascending offsets");
    if (end > room)
        return err_set(r->e, ERR_FORMAT, "data ends at byte %lld of %lld in the file (truncated?)",
                       (long long)end + r->data_at, (long long)r->m->n_bytes);
    if (end - begin != t->n_bytes)
        return err_set(r->e, ERR_FORMAT, "data_offsets span %lld bytes, shape and dtype %lld",
                       (long long)(end - begin), (long long)t->n_bytes);
    t->offset = r->data_at + begin;
    t->data = r->m->data + t->offset;
    return ERR_NONE;
}

static err_code read_tensor(reader *r, const char *name, size_t name_bytes, const json_value *v)
{
    if (!st_plain_name(name))
        return err_set(r->e, ERR_FORMAT, "tensor name is empty or has control characters");
    if (name_bytes > ST_NAME_LIMIT)
        return err_set(r->e, ERR_LIMIT, "tensor name %.40s... is longer than %d bytes", name,
                       ST_NAME_LIMIT);
    st_tensor *t = &r->h->tensors[r->h->n_tensors++];
    t->name = memcpy(r->h->names + r->names_used, name, name_bytes + 1);
    t->file = r->path;
    r->names_used += name_bytes + 1;
    if (json_type_of(v) != JSON_OBJECT)
        return err_set(r->e, ERR_FORMAT, "tensor %s: not described by an object", name);
    if (read_dtype(t, json_get(v, "dtype"), r->e) || read_shape(t, json_get(v, "shape"), r->e) ||
        read_place(r, t, json_get(v, "data_offsets")))
        return err_prefix(r->e, "tensor %s", name);
    return ERR_NONE;
}

static void append_string(reader *r, const char *s)
{
    size_t n = strlen(s) + 1;
    memcpy(r->h->metadata + r->metadata_used, s, n);
    r->metadata_used += n;
}

static int read_metadata(void *ctx, const char *key, size_t key_bytes, json_value *v)
{
    (void)key_bytes;
    reader *r = ctx;
    const char *s = json_string(v, NULL);
    if (!s) return (int)err_set(r->e, ERR_FORMAT, "__metadata__ has a value that is no string");
    append_string(r, key);
    append_string(r, s);
    r->h->n_metadata++;
    return 0;
}

static int read_member(void *ctx, const char *key, size_t key_bytes, json_value *v)
{
    reader *r = ctx;
    if (strcmp(key, "__metadata__") != 0) return (int)read_tensor(r, key, key_bytes, v);
    if (json_type_of(v) == JSON_NULL) return 0; /* mx.save_safetensors without metadata */
    if (json_type_of(v) != JSON_OBJECT)
        return (int)err_set(r->e, ERR_FORMAT, "__metadata__ is not an object");
    return json_each(v, read_metadata, r);
}

static int by_place(const void *a, const void *b)
{
    const st_tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes);
}

/* Every byte of the data belongs to exactly one tensor, as the reference implementation demands:
 * nothing can hide in a file, and no two names can alias. */
static err_code check_cover(const reader *r)
{
    int64_t at = r->data_at;
    for (int64_t i = 0; i < r->h->n_tensors; i++) {
        const st_tensor *t = &r->h->tensors[i];
        if (t->offset < at)
            return err_set(r->e, ERR_FORMAT, "tensor %s: data overlaps that of %s", t->name,
                           r->h->tensors[i - 1].name);
        if (t->offset > at)
            return err_set(r->e, ERR_FORMAT, "tensor %s: %lld bytes before it belong to no tensor",
                           t->name, (long long)(t->offset - at));
        at += t->n_bytes;
    }
    if (at != (int64_t)r->m->n_bytes)
        return err_set(r->e, ERR_FORMAT, "%lld bytes at the end belong to no tensor",
                       (long long)r->m->n_bytes - at);
    return ERR_NONE;
}

static err_code read_header(reader *r, const json_doc *doc, size_t header_bytes)
{
    const json_value *root = json_root(doc);
    const char *repeated = json_repeated_key(doc);
    st_header *h = r->h;
    if (repeated)
        return err_set(r->e, ERR_FORMAT, "tensor %.255s is listed twice",
                       st_plain_name(repeated) ? repeated : "");
    /* Each key and metadata value is shorter, with its NUL, than its quoted form in the header. */
    h->tensors = mem_array(json_length(root), sizeof *h->tensors, r->e);
    h->names = mem_array(header_bytes, 1, r->e);
    h->metadata = mem_array(json_has(root, "__metadata__") ? header_bytes : 0, 1, r->e);
    if (!h->tensors || !h->names || !h->metadata) return ERR_MEMORY;
    int failed = json_each(root, read_member, r);
    if (failed) return (err_code)failed;
    qsort(h->tensors, (size_t)h->n_tensors, sizeof *h->tensors, by_place);
    return check_cover(r);
}

/* Length of the JSON text behind the 8-byte prefix. */
static err_code header_length(const map_file *m, size_t *n_bytes, err_info *e)
{
    uint64_t n = 0;
    if (m->n_bytes < 8)
        return err_set(e, ERR_FORMAT, "%zu bytes are too few for a safetensors file", m->n_bytes);
    for (int i = 7; i >= 0; i--) n = n << 8 | m->data[i];
    if (n > ST_HEADER_LIMIT)
        return err_set(e, ERR_FORMAT,
                       "header length %llu is above the limit of %d bytes (no safetensors file?)",
                       (unsigned long long)n, ST_HEADER_LIMIT);
    if (n > m->n_bytes - 8)
        return err_set(e, ERR_FORMAT, "header of %llu bytes in a file of %zu (truncated?)",
                       (unsigned long long)n, m->n_bytes);
    if (n < 2 || m->data[8] != '{') return err_set(e, ERR_FORMAT, "header does not begin with '{'");
    *n_bytes = (size_t)n;
    return ERR_NONE;
}

err_code st_header_read(st_header *h, const map_file *m, const char *path, err_info *e)
{
    size_t header_bytes = 0;
    *h = (st_header){0};
    if (header_length(m, &header_bytes, e)) return err_prefix(e, "%s", path);
    json_doc *doc = json_parse((const char *)m->data + 8, header_bytes, "header", HEADER_DEPTH, e);
    if (!doc) return err_prefix(e, "%s", path);
    reader r = {.h = h, .m = m, .path = path, .data_at = (int64_t)header_bytes + 8, .e = e};
    err_code code = read_header(&r, doc, header_bytes);
    json_close(doc);
    if (code) {
        st_header_free(h);
        err_prefix(e, "%s", path);
    }
    return code;
}

void st_header_free(st_header *h)
{
    mem_free(h->tensors);
    mem_free(h->names);
    mem_free(h->metadata);
    *h = (st_header){0};
}
