/* kv: rows of the key/value cache, the pages they lie in and the codecs they are stored in. */
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

static int64_t kv_width(const model *m)
{
    return (int64_t)m->config.n_kv_heads * m->config.head_dim;
}

int64_t kv_row_bytes(const model *m, kv_codec codec)
{
    return kv_width(m) * (codec == KV_F32 ? 4 : 2);
}

int kv_mtp_slot(const model *m)
{
    int n = 0;
    for (int i = 0; i < m->config.n_layers; i++) n += m->config.is_full[i];
    return n;
}

int kv_n_slots(const model *m)
{
    return kv_mtp_slot(m) + (m->weights.mtp.present ? 1 : 0);
}

int64_t kv_n_pages(int64_t n_rows)
{
    return (n_rows + KV_PAGE_ROWS - 1) / KV_PAGE_ROWS;
}

void kv_own(ses *s, int64_t pos, int64_t n)
{
    for (int64_t i = pos / KV_PAGE_ROWS; i < kv_n_pages(pos + n); i++)
        kv_page_own(s->kv, &s->pages[i]);
}

static char *row_at(const ses *s, int slot, kv_which which, int64_t pos)
{
    int64_t row = (2 * (int64_t)slot + which) * KV_PAGE_ROWS + pos % KV_PAGE_ROWS;
    return s->pages[pos / KV_PAGE_ROWS]->rows + row * kv_row_bytes(s->m, s->codec);
}

void kv_write(ses *s, int slot, int64_t pos, const float *key, const float *value)
{
    int64_t width = kv_width(s->m), bytes = kv_row_bytes(s->m, s->codec);
    char *k = row_at(s, slot, KV_KEY, pos), *v = row_at(s, slot, KV_VALUE, pos);
    if (s->codec == KV_F32) {
        memcpy(k, key, (size_t)bytes);
        memcpy(v, value, (size_t)bytes);
    } else {
        s->m->ops->f16_encode(key, (uint16_t *)k, width);
        s->m->ops->f16_encode(value, (uint16_t *)v, width);
    }
}

const float *kv_head_rows(const ses *s, int slot, kv_which which, int64_t pos, int n, int h,
                          float *tmp, int64_t *ld)
{
    int64_t width = kv_width(s->m), D = s->m->config.head_dim, at = h * D;
    const char *rows = row_at(s, slot, which, pos);
    if (s->codec == KV_F32) {
        *ld = width;
        return (const float *)(const void *)rows + at;
    }
    for (int i = 0; i < n; i++)
        s->m->ops->f16_decode((const uint16_t *)(const void *)rows + at + i * width, tmp + i * D,
                              D);
    *ld = D;
    return tmp;
}
