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

static int64_t codec_bytes(kv_codec codec)
{
    return codec == KV_F32 ? 4 : 2;
}

int64_t kv_row_bytes(const model *m, kv_codec codec)
{
    return kv_width(m) * codec_bytes(codec);
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

/* Head h of the keys or values of page `page`. */
static char *head_at(const ses *s, int slot, kv_which which, int64_t page, int h)
{
    int64_t at = (2 * (int64_t)slot + which) * s->m->config.n_kv_heads + h;
    int64_t bytes = KV_PAGE_ROWS * s->m->config.head_dim * codec_bytes(s->codec);
    return s->pages[page]->rows + at * bytes;
}

const void *kv_head(const ses *s, int slot, kv_which which, int64_t page, int h)
{
    return head_at(s, slot, which, page, h);
}

/* One position's key across a page, whose dimensions are rows. */
static void write_key(const ses *s, char *page, int64_t at, const float *key)
{
    enum { PIECE = 64 };
    uint16_t codes[PIECE];
    int64_t D = s->m->config.head_dim;
    if (s->codec == KV_F32) {
        float *to = (float *)(void *)page + at;
        for (int64_t d = 0; d < D; d++) to[d * KV_PAGE_ROWS] = key[d];
        return;
    }
    uint16_t *to = (uint16_t *)(void *)page + at;
    for (int64_t first = 0; first < D; first += PIECE) {
        int64_t n = D - first < PIECE ? D - first : PIECE;
        s->m->ops->f16_encode(key + first, codes, n);
        for (int64_t d = 0; d < n; d++) to[(first + d) * KV_PAGE_ROWS] = codes[d];
    }
}

void kv_write(ses *s, int slot, int64_t pos, const float *key, const float *value)
{
    int64_t D = s->m->config.head_dim, row = D * codec_bytes(s->codec);
    int64_t page = pos / KV_PAGE_ROWS, at = pos % KV_PAGE_ROWS;
    for (int h = 0; h < s->m->config.n_kv_heads; h++) {
        char *v = head_at(s, slot, KV_VALUE, page, h) + at * row;
        write_key(s, head_at(s, slot, KV_KEY, page, h), at, key + h * D);
        if (s->codec == KV_F32)
            memcpy(v, value + h * D, (size_t)row);
        else
            s->m->ops->f16_encode(value + h * D, (uint16_t *)(void *)v, D);
    }
}

void kv_read(const ses *s, int slot, int64_t pos, float *key, float *value)
{
    int64_t D = s->m->config.head_dim, at = pos % KV_PAGE_ROWS, step[2] = {KV_PAGE_ROWS, 1};
    for (int64_t i = 0; i < 2 * kv_width(s->m); i++) {
        kv_which which = i < kv_width(s->m) ? KV_KEY : KV_VALUE;
        int64_t column = i % kv_width(s->m), h = column / D, d = column % D;
        const void *p = head_at(s, slot, which, pos / KV_PAGE_ROWS, (int)h);
        float *out = (which == KV_KEY ? key : value) + column;
        int64_t from = d * step[which] + at * (which == KV_KEY ? 1 : D);
        if (s->codec == KV_F32)
            *out = ((const float *)p)[from];
        else
            s->m->ops->f16_decode((const uint16_t *)p + from, out, 1);
    }
}
