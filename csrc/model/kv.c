/* kv: rows of the key/value cache and the codecs they are stored in. */
#include "model/pass.h"

#include <string.h>

const char *kv_codec_name(kv_codec codec)
{
    static const char *const names[KV_N_CODECS] = {"f32", "f16"};
    return (unsigned)codec < KV_N_CODECS ? names[codec] : "unknown";
}

int kv_codec_parse(const char *name)
{
    for (int i = 0; i < KV_N_CODECS; i++)
        if (strcmp(name, kv_codec_name((kv_codec)i)) == 0) return i;
    return -1;
}

static int64_t kv_width(const ses *s)
{
    return (int64_t)s->m->config.n_kv_heads * s->m->config.head_dim;
}

int64_t kv_row_bytes(const ses *s)
{
    return kv_width(s) * (s->codec == KV_F32 ? 4 : 2);
}

void kv_write(ses *s, kv_layer *kv, int64_t pos, const float *key, const float *value)
{
    int64_t width = kv_width(s), bytes = kv_row_bytes(s);
    char *k = (char *)kv->key + pos * bytes, *v = (char *)kv->value + pos * bytes;
    if (s->codec == KV_F32) {
        memcpy(k, key, (size_t)bytes);
        memcpy(v, value, (size_t)bytes);
    } else {
        s->m->ops->f16_encode(key, (uint16_t *)k, width);
        s->m->ops->f16_encode(value, (uint16_t *)v, width);
    }
}

const float *kv_head_rows(const ses *s, const void *rows, int64_t pos, int n, int h, float *tmp,
                          int64_t *ld)
{
    int64_t width = kv_width(s), D = s->m->config.head_dim, at = pos * width + h * D;
    if (s->codec == KV_F32) {
        *ld = width;
        return (const float *)rows + at;
    }
    for (int i = 0; i < n; i++)
        s->m->ops->f16_decode((const uint16_t *)rows + at + i * width, tmp + i * D, D);
    *ld = D;
    return tmp;
}
