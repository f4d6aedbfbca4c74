#include <string.h>

#include "base/mem.h"
#include "io/file.h"
#include "io/gguf.h"

enum { ALIGNMENT = 32 };

typedef struct out { /* header text, counted first and then written */
    uint8_t *data;   /* NULL while counting */
    int64_t n;
} out;

static void put(out *o, const void *data, int64_t n)
{
    if (o->data) memcpy(o->data + o->n, data, (size_t)n);
    o->n += n;
}

static void put_u32(out *o, uint32_t x)
{
    put(o, &x, 4);
}

static void put_u64(out *o, int64_t x)
{
    put(o, &x, 8);
}

static void put_string(out *o, const char *s)
{
    int64_t n = (int64_t)strlen(s);
    put_u64(o, n);
    put(o, s, n);
}

static void put_value(out *o, const gguf_out_value *v)
{
    int64_t n = v->is_array ? v->n : 1;
    put_string(o, v->key);
    if (v->is_array) put_u32(o, GGUF_ARRAY);
    put_u32(o, v->kind);
    if (v->is_array) put_u64(o, n);
    if (v->kind == GGUF_U32)
        put(o, v->data, 4 * n);
    else
        for (int64_t i = 0; i < n; i++) put_string(o, ((const char *const *)v->data)[i]);
}

static int64_t aligned(int64_t n)
{
    return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static int64_t tensor_bytes(const gguf_out_tensor *t)
{
    int64_t n = 4;
    for (int i = 0; i < t->n_dims; i++) n *= t->dims[i];
    return n;
}

static void put_header(out *o, const gguf_out_value *values, int64_t n_values,
                       const gguf_out_tensor *tensors, int64_t n_tensors)
{
    int64_t offset = 0;
    put(o, "GGUF", 4);
    put_u32(o, 3);
    put_u64(o, n_tensors);
    put_u64(o, n_values);
    for (int64_t i = 0; i < n_values; i++) put_value(o, &values[i]);
    for (int64_t i = 0; i < n_tensors; i++) {
        const gguf_out_tensor *t = &tensors[i];
        put_string(o, t->name);
        put_u32(o, (uint32_t)t->n_dims);
        for (int d = 0; d < t->n_dims; d++) put_u64(o, t->dims[d]);
        put_u32(o, GGUF_TYPE_F32);
        put_u64(o, offset);
        offset += aligned(tensor_bytes(t));
    }
}

/* What gguf_open takes. */
static int is_plain(const char *name)
{
    size_t n = 0;
    while ((unsigned char)name[n] >= 0x20 && name[n] != 0x7f) n++;
    return n > 0 && n <= GGUF_NAME_LIMIT && !name[n];
}

static err_code check(const char *path, const gguf_out_tensor *tensors, int64_t n, err_info *e)
{
    int64_t total = 0;
    for (int64_t i = 0; i < n; i++) {
        const gguf_out_tensor *t = &tensors[i];
        int64_t bytes = 4;
        int bad = !is_plain(t->name) || t->n_dims < 1 || t->n_dims > GGUF_MAX_DIMS;
        for (int d = 0; d < t->n_dims && !bad; d++)
            bad = t->dims[d] < 1 || __builtin_mul_overflow(bytes, t->dims[d], &bytes);
        if (bad || __builtin_add_overflow(total, bytes, &total) || total > INT64_MAX / 2)
            return err_set(e, ERR_RANGE, "%s: tensor %.255s: impossible name or shape", path,
                           t->name);
    }
    return ERR_NONE;
}

static err_code put_padded(file_out *f, const void *data, int64_t n, err_info *e)
{
    static const uint8_t zeros[ALIGNMENT];
    err_code code = file_out_put(f, data, (size_t)n, e);
    return code ? code : file_out_put(f, zeros, (size_t)(aligned(n) - n), e);
}

err_code gguf_write(const char *path, const gguf_out_value *values, int64_t n_values,
                    const gguf_out_tensor *tensors, int64_t n_tensors, err_info *e)
{
    file_out f;
    out o = {0};
    err_code code = check(path, tensors, n_tensors, e);
    if (code) return code;
    put_header(&o, values, n_values, tensors, n_tensors);
    uint8_t *header = mem_array((size_t)o.n, 1, e);
    if (!header) return ERR_MEMORY;
    o = (out){.data = header};
    put_header(&o, values, n_values, tensors, n_tensors);
    code = file_out_open(&f, path, e);
    if (!code) code = put_padded(&f, header, o.n, e);
    for (int64_t i = 0; i < n_tensors && !code; i++)
        code = put_padded(&f, tensors[i].data, tensor_bytes(&tensors[i]), e);
    if (code)
        file_out_abort(&f);
    else
        code = file_out_finish(&f, e);
    mem_free(header);
    return code;
}
