#include "io/gguf.h"

#include <stdlib.h>
#include <string.h>

#include "base/map.h"
#include "base/mem.h"

/* KEY_LIMIT is the format's. */
enum { KEY_LIMIT = 65535, DEFAULT_ALIGNMENT = 32, MAX_ALIGNMENT = 1 << 20 };

struct gguf_file {
    char *path;
    map_file map;
    gguf_value *values;   /* [n_values]; keys are owned one by one */
    gguf_tensor *tensors; /* [n_tensors]; names likewise */
    int64_t n_values, n_tensors;
};

/* ---- kinds and types -------------------------------------------------------------------- */

/* Bytes of one number; 0 for strings, arrays and what is no kind. */
static int64_t kind_bytes(uint32_t kind)
{
    static const uint8_t bytes[GGUF_N_KINDS] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return kind < GGUF_N_KINDS ? bytes[kind] : 0;
}

typedef struct block { /* elements of a row are stored in blocks */
    uint16_t elements, bytes;
} block;

/* By ggml's number: ggml.h (enum ggml_type), sizes of ggml-common.h's structs. */
static block type_block(uint32_t type)
{
    static const block blocks[] = {
        [0] = {1, 4},      [1] = {1, 2},      [2] = {32, 18},    [3] = {32, 20},
        [6] = {32, 22},    [7] = {32, 24},    [8] = {32, 34},    [9] = {32, 40},
        [10] = {256, 84},  [11] = {256, 110}, [12] = {256, 144}, [13] = {256, 176},
        [14] = {256, 210}, [15] = {256, 292}, [16] = {256, 66},  [17] = {256, 74},
        [18] = {256, 98},  [19] = {256, 50},  [20] = {32, 18},   [21] = {256, 110},
        [22] = {256, 82},  [23] = {256, 136}, [24] = {1, 1},     [25] = {1, 2},
        [26] = {1, 4},     [27] = {1, 8},     [28] = {1, 8},     [29] = {256, 56},
        [30] = {1, 2},     [34] = {256, 54},  [35] = {256, 66},  [39] = {32, 17},
        [40] = {64, 36},
    };
    return type < sizeof blocks / sizeof *blocks ? blocks[type] : (block){0, 0};
}

/* ---- reading bytes ---------------------------------------------------------------------- */

typedef struct cursor {
    const gguf_file *f;
    int64_t at;
    err_info *e;
} cursor;

static err_code fail(const cursor *c, err_code code, const char *what)
{
    return err_set(c->e, code, "%s: byte %lld: %s", c->f->path, (long long)c->at, what);
}

static int64_t left(const cursor *c)
{
    return (int64_t)c->f->map.n_bytes - c->at;
}

static const uint8_t *here(const cursor *c)
{
    return c->f->map.data + c->at;
}

static err_code take(cursor *c, void *out, int64_t n, const char *what)
{
    if (left(c) < n)
        return err_set(c->e, ERR_FORMAT, "%s: byte %lld: the file ends inside %s", c->f->path,
                       (long long)c->at, what);
    memcpy(out, here(c), (size_t)n);
    c->at += n;
    return ERR_NONE;
}

/* A u64 that counts things of at least `least` bytes that follow. */
static err_code take_count(cursor *c, int64_t least, int64_t *out, const char *what)
{
    uint64_t n = 0;
    int64_t at = c->at;
    if (take(c, &n, 8, what)) return c->e->code;
    if (n <= (uint64_t)(left(c) / least)) {
        *out = (int64_t)n;
        return ERR_NONE;
    }
    return err_set(c->e, ERR_FORMAT, "%s: byte %lld: %s is %llu, %lld bytes follow", c->f->path,
                   (long long)at, what, (unsigned long long)n, (long long)left(c));
}

/* A string of `limit` bytes at most that can stand in a one-line text; the copy is the caller's. */
static err_code take_name(cursor *c, int64_t limit, char **out, const char *what)
{
    int64_t n = 0, at = c->at;
    if (take_count(c, 1, &n, what)) return c->e->code;
    int plain = n > 0 && n <= limit;
    for (int64_t i = 0; i < n && plain; i++) plain = here(c)[i] >= 0x20 && here(c)[i] != 0x7f;
    if (!plain)
        return err_set(c->e, ERR_FORMAT,
                       "%s: byte %lld: %s is empty, longer than %lld bytes or has control "
                       "characters",
                       c->f->path, (long long)at, what, (long long)limit);
    *out = mem_copy((const char *)here(c), (size_t)n, c->e);
    if (!*out) return ERR_MEMORY;
    c->at += n;
    return ERR_NONE;
}

/* ---- values ----------------------------------------------------------------------------- */

static err_code skip_strings(cursor *c, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        int64_t bytes = 0;
        if (take_count(c, 1, &bytes, "the length of a string")) return c->e->code;
        c->at += bytes;
    }
    return ERR_NONE;
}

static err_code take_elements(cursor *c, gguf_value *v, uint32_t kind)
{
    int64_t size = kind_bytes(kind);
    if (kind != GGUF_STRING && size == 0)
        return err_set(c->e, ERR_UNSUPPORTED, "%s: byte %lld: value %.255s is of unknown kind %u",
                       c->f->path, (long long)c->at - 4, v->key, kind);
    v->kind = (gguf_kind)kind;
    v->n = 1;
    if (v->is_array && take_count(c, size ? size : 8, &v->n, "the length of an array"))
        return c->e->code;
    v->data = here(c);
    if (kind == GGUF_STRING) return skip_strings(c, v->n);
    if (left(c) < v->n * size) return fail(c, ERR_FORMAT, "the file ends inside a value");
    c->at += v->n * size;
    return ERR_NONE;
}

static err_code take_value(cursor *c, gguf_value *v)
{
    uint32_t kind = 0;
    char *key = NULL;
    if (take_name(c, KEY_LIMIT, &key, "the key of a value")) return c->e->code;
    v->key = key;
    if (take(c, &kind, 4, "the kind of a value")) return c->e->code;
    v->is_array = kind == GGUF_ARRAY;
    if (v->is_array && take(c, &kind, 4, "the kind of an array")) return c->e->code;
    return take_elements(c, v, kind);
}

/* ---- tensors ---------------------------------------------------------------------------- */

static err_code bad_tensor(const cursor *c, const gguf_tensor *t, err_code code, const char *what)
{
    return err_set(c->e, code, "%s: tensor %s: %s", c->f->path, t->name, what);
}

static err_code take_dims(cursor *c, gguf_tensor *t)
{
    uint32_t n = 0;
    if (take(c, &n, 4, "a number of dimensions")) return c->e->code;
    if (n > GGUF_MAX_DIMS) return bad_tensor(c, t, ERR_UNSUPPORTED, "more than 4 dimensions");
    t->n_dims = (int)n;
    t->n_elements = 1;
    for (int i = 0; i < GGUF_MAX_DIMS; i++) {
        t->dims[i] = 1;
        if (i < t->n_dims && take(c, &t->dims[i], 8, "a dimension")) return c->e->code;
        if (t->dims[i] < 0 || __builtin_mul_overflow(t->n_elements, t->dims[i], &t->n_elements))
            return bad_tensor(c, t, ERR_FORMAT, "more than 2^63 elements");
    }
    return ERR_NONE;
}

/* Everything but the place of its data, which is not known before all are read. */
static err_code take_tensor(cursor *c, gguf_tensor *t)
{
    char *name = NULL;
    if (take_name(c, GGUF_NAME_LIMIT, &name, "the name of a tensor")) return c->e->code;
    t->name = name;
    if (take_dims(c, t) || take(c, &t->type, 4, "the type of a tensor") ||
        take(c, &t->offset, 8, "the offset of a tensor"))
        return c->e->code;
    block b = type_block(t->type);
    if (!b.elements)
        return err_set(c->e, ERR_UNSUPPORTED, "%s: tensor %s: unknown type %u", c->f->path, t->name,
                       t->type);
    if (t->dims[0] % b.elements)
        return err_set(c->e, ERR_FORMAT,
                       "%s: tensor %s: rows of %lld do not divide into blocks of %d", c->f->path,
                       t->name, (long long)t->dims[0], b.elements);
    if (__builtin_mul_overflow(t->n_elements / b.elements, (int64_t)b.bytes, &t->n_bytes))
        return bad_tensor(c, t, ERR_FORMAT, "more than 2^63 bytes");
    return ERR_NONE;
}

static err_code find_alignment(const cursor *c, int64_t *out)
{
    const gguf_value *v = NULL;
    for (int64_t i = 0; i < c->f->n_values && !v; i++)
        if (strcmp(c->f->values[i].key, "general.alignment") == 0) v = &c->f->values[i];
    int64_t n = v ? gguf_int(v, 0, 0) : DEFAULT_ALIGNMENT;
    if (n < 1 || n > MAX_ALIGNMENT || (n & (n - 1)))
        return err_set(c->e, ERR_FORMAT, "%s: general.alignment is no power of two up to %d",
                       c->f->path, MAX_ALIGNMENT);
    *out = n;
    return ERR_NONE;
}

/* Data begins at the next aligned byte; tensors follow each other, each at an aligned byte. */
static err_code place_tensors(const cursor *c)
{
    int64_t align = 0, n_bytes = (int64_t)c->f->map.n_bytes, next = 0;
    if (find_alignment(c, &align)) return c->e->code;
    int64_t base = (c->at + align - 1) / align * align;
    for (int64_t i = 0; i < c->f->n_tensors; i++) {
        gguf_tensor *t = &c->f->tensors[i];
        if (t->offset != next)
            return err_set(c->e, ERR_FORMAT, "%s: tensor %s: its offset is %lld, %lld expected",
                           c->f->path, t->name, (long long)t->offset, (long long)next);
        if (base > n_bytes || t->offset > n_bytes - base || t->n_bytes > n_bytes - base - t->offset)
            return err_set(c->e, ERR_FORMAT,
                           "%s: tensor %s: %lld bytes from byte %lld on are not in the file of "
                           "%lld (truncated?)",
                           c->f->path, t->name, (long long)t->n_bytes,
                           (long long)(base + t->offset), (long long)n_bytes);
        t->offset += base;
        t->data = c->f->map.data + t->offset;
        next = (t->offset - base + t->n_bytes + align - 1) / align * align;
    }
    return ERR_NONE;
}

/* ---- the file --------------------------------------------------------------------------- */

static int by_key(const void *a, const void *b)
{
    return strcmp(((const gguf_value *)a)->key, ((const gguf_value *)b)->key);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const gguf_tensor *)a)->name, ((const gguf_tensor *)b)->name);
}

static err_code sort_tables(gguf_file *f, err_info *e)
{
    qsort(f->values, (size_t)f->n_values, sizeof *f->values, by_key);
    qsort(f->tensors, (size_t)f->n_tensors, sizeof *f->tensors, by_name);
    for (int64_t i = 1; i < f->n_values; i++)
        if (by_key(&f->values[i - 1], &f->values[i]) == 0)
            return err_set(e, ERR_FORMAT, "%s: value %.255s is there twice", f->path,
                           f->values[i].key);
    for (int64_t i = 1; i < f->n_tensors; i++)
        if (by_name(&f->tensors[i - 1], &f->tensors[i]) == 0)
            return err_set(e, ERR_FORMAT, "%s: tensor %s is there twice", f->path,
                           f->tensors[i].name);
    return ERR_NONE;
}

static err_code take_version(cursor *c)
{
    char magic[4];
    uint32_t version = 0;
    if (take(c, magic, 4, "the magic bytes")) return c->e->code;
    if (memcmp(magic, "GGUF", 4) != 0)
        return err_set(c->e, ERR_FORMAT, "%s: not a GGUF file", c->f->path);
    if (take(c, &version, 4, "the version")) return c->e->code;
    if (version == 2 || version == 3) return ERR_NONE;
    if ((version & 0xffff) == 0)
        return err_set(c->e, ERR_UNSUPPORTED, "%s: a big-endian GGUF file", c->f->path);
    return err_set(c->e, ERR_UNSUPPORTED, "%s: GGUF version %u, only 2 and 3 are read", c->f->path,
                   version);
}

static err_code read_header(gguf_file *f, err_info *e)
{
    /* A value takes its key's length, a kind and a byte; a tensor length, dimensions, type and
     * offset. */
    enum { LEAST_VALUE = 8 + 4 + 1, LEAST_TENSOR = 8 + 4 + 4 + 8 };
    cursor c = {.f = f, .e = e};
    int64_t n_tensors = 0, n_values = 0;
    if (take_version(&c) || take_count(&c, LEAST_TENSOR, &n_tensors, "the number of tensors") ||
        take_count(&c, LEAST_VALUE, &n_values, "the number of values"))
        return e->code;
    f->values = mem_array((size_t)n_values, sizeof *f->values, e);
    f->tensors = mem_array((size_t)n_tensors, sizeof *f->tensors, e);
    if (!f->values || !f->tensors) return ERR_MEMORY;
    while (f->n_values < n_values)
        if (take_value(&c, &f->values[f->n_values++])) return e->code;
    while (f->n_tensors < n_tensors)
        if (take_tensor(&c, &f->tensors[f->n_tensors++])) return e->code;
    return place_tensors(&c) ? e->code : sort_tables(f, e);
}

gguf_file *gguf_open(const char *path, err_info *e)
{
    err_info own = {0};
    if (!e) e = &own;
    gguf_file *f = mem_array(1, sizeof *f, e);
    if (!f) return NULL;
    f->path = mem_copy(path, strlen(path), e);
    if (!f->path || map_open(&f->map, path, e) || read_header(f, e)) {
        gguf_close(f);
        return NULL;
    }
    return f;
}

void gguf_close(gguf_file *f)
{
    if (!f) return;
    for (int64_t i = 0; i < f->n_values; i++) mem_free((char *)(uintptr_t)f->values[i].key);
    for (int64_t i = 0; i < f->n_tensors; i++) mem_free((char *)(uintptr_t)f->tensors[i].name);
    mem_free(f->values);
    mem_free(f->tensors);
    map_close(&f->map);
    mem_free(f->path);
    mem_free(f);
}

int gguf_is(const char *path)
{
    map_file m; /* which does not wait for a pipe to be written to */
    if (map_open(&m, path, NULL)) return 0;
    int is = m.n_bytes >= 4 && memcmp(m.data, "GGUF", 4) == 0;
    map_close(&m);
    return is;
}

/* ---- looking up ------------------------------------------------------------------------- */

int64_t gguf_n_values(const gguf_file *f)
{
    return f->n_values;
}

const gguf_value *gguf_value_at(const gguf_file *f, int64_t i)
{
    return i >= 0 && i < f->n_values ? &f->values[i] : NULL;
}

const gguf_value *gguf_find(const gguf_file *f, const char *key)
{
    gguf_value wanted = {.key = key};
    return bsearch(&wanted, f->values, (size_t)f->n_values, sizeof wanted, by_key);
}

int64_t gguf_n_tensors(const gguf_file *f)
{
    return f->n_tensors;
}

const gguf_tensor *gguf_tensor_at(const gguf_file *f, int64_t i)
{
    return i >= 0 && i < f->n_tensors ? &f->tensors[i] : NULL;
}

const gguf_tensor *gguf_find_tensor(const gguf_file *f, const char *name)
{
    gguf_tensor wanted = {.name = name};
    return bsearch(&wanted, f->tensors, (size_t)f->n_tensors, sizeof wanted, by_name);
}

int64_t gguf_int(const gguf_value *v, int64_t i, int64_t fallback)
{
    if (!v || i < 0 || i >= v->n || !kind_bytes(v->kind)) return fallback;
    const uint8_t *p = v->data + i * kind_bytes(v->kind);
    uint64_t u = 0;
    memcpy(&u, p, (size_t)kind_bytes(v->kind));
    switch (v->kind) {
    case GGUF_U8:
    case GGUF_U16:
    case GGUF_U32: return (int64_t)u;
    case GGUF_BOOL: return u != 0;
    case GGUF_I8: return (int8_t)u;
    case GGUF_I16: return (int16_t)u;
    case GGUF_I32: return (int32_t)u;
    case GGUF_I64: return (int64_t)u;
    case GGUF_U64: return u <= INT64_MAX ? (int64_t)u : fallback;
    default: return fallback;
    }
}

double gguf_float(const gguf_value *v, int64_t i, double fallback)
{
    if (!v || i < 0 || i >= v->n) return fallback;
    if (v->kind == GGUF_F32) {
        float x;
        memcpy(&x, v->data + 4 * i, 4);
        return x;
    }
    if (v->kind == GGUF_F64) {
        double x;
        memcpy(&x, v->data + 8 * i, 8);
        return x;
    }
    int64_t n = gguf_int(v, i, INT64_MIN);
    return n == INT64_MIN || v->kind == GGUF_BOOL ? fallback : (double)n;
}

int gguf_each_string(const gguf_value *v, int (*fn)(void *ctx, const char *s, size_t n_bytes),
                     void *ctx)
{
    if (!v || v->kind != GGUF_STRING) return -1;
    const uint8_t *p = v->data;
    for (int64_t i = 0; i < v->n; i++) {
        uint64_t n;
        memcpy(&n, p, 8);
        int stop = fn(ctx, (const char *)p + 8, (size_t)n);
        if (stop) return stop;
        p += 8 + n;
    }
    return 0;
}

int gguf_is_string(const gguf_value *v, const char *s)
{
    if (!v || v->kind != GGUF_STRING || v->is_array) return 0;
    uint64_t n;
    memcpy(&n, v->data, 8);
    return n == strlen(s) && memcmp(v->data + 8, s, (size_t)n) == 0;
}
