/* kv: rows of the key/value cache, the pages they lie in and the codecs they are stored in. */
#include "model/pass.h"

#include <string.h>

#include "num/fp.h"

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

/* Of a head's keys in a page, and what its values take, too: fewer sizes are behind those. */
static int64_t head_bytes(const model *m, kv_codec codec)
{
    int64_t D = m->config.head_dim;
    return KV_PAGE_ROWS * (D + kern_key_parts(D)) * codec_bytes(codec);
}

int64_t kv_page_bytes(const model *m, kv_codec codec)
{
    return 2 * (int64_t)kv_n_slots(m) * m->config.n_kv_heads * head_bytes(m, codec);
}

/* Head h of the keys or values of page `page`. */
static char *head_at(const ses *s, int slot, kv_which which, int64_t page, int h)
{
    int64_t at = (2 * (int64_t)slot + which) * s->m->config.n_kv_heads + h;
    return s->pages[page]->rows + at * head_bytes(s->m, s->codec);
}

const void *kv_head(const ses *s, int slot, kv_which which, int64_t page, int h)
{
    return head_at(s, slot, which, page, h);
}

/* The largest magnitude of n numbers, as its bits: they have the order of magnitudes. */
static uint16_t size_of_halves(const uint16_t *x, int64_t n)
{
    uint16_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t size = x[i] & 0x7fff;
        largest = size > largest ? size : largest;
    }
    return largest;
}

static float size_of_floats(const float *x, int64_t n)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t size = fp_bits(x[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return fp_from_bits(largest);
}

/* One position's key across a page, whose dimensions are rows, and its parts' sizes. */
static void write_key(const ses *s, char *page, int64_t at, const float *key)
{
    uint16_t codes[KERN_KEY_PART];
    int64_t D = s->m->config.head_dim;
    float *floats = (float *)(void *)page + at;
    uint16_t *halves = (uint16_t *)(void *)page + at;
    for (int64_t first = 0; first < D; first += KERN_KEY_PART) {
        int64_t n = D - first < KERN_KEY_PART ? D - first : KERN_KEY_PART;
        int64_t to = first * KV_PAGE_ROWS, size = (D + first / KERN_KEY_PART) * KV_PAGE_ROWS;
        if (s->codec == KV_F32) {
            for (int64_t d = 0; d < n; d++) floats[to + d * KV_PAGE_ROWS] = key[first + d];
            floats[size] = size_of_floats(key + first, n);
        } else {
            s->m->ops->f16_encode(key + first, codes, n);
            for (int64_t d = 0; d < n; d++) halves[to + d * KV_PAGE_ROWS] = codes[d];
            halves[size] = size_of_halves(codes, n);
        }
    }
}

static void write_value(const ses *s, char *page, int64_t at, const float *value)
{
    int64_t D = s->m->config.head_dim, to = at * D, size = D * KV_PAGE_ROWS + at;
    if (s->codec == KV_F32) {
        float *floats = (float *)(void *)page;
        memcpy(floats + to, value, (size_t)D * sizeof *value);
        floats[size] = size_of_floats(value, D);
    } else {
        uint16_t *halves = (uint16_t *)(void *)page;
        s->m->ops->f16_encode(value, halves + to, D);
        halves[size] = size_of_halves(halves + to, D);
    }
}

void kv_write(ses *s, int slot, int64_t pos, const float *key, const float *value)
{
    int64_t D = s->m->config.head_dim, page = pos / KV_PAGE_ROWS, at = pos % KV_PAGE_ROWS;
    for (int h = 0; h < s->m->config.n_kv_heads; h++) {
        write_key(s, head_at(s, slot, KV_KEY, page, h), at, key + h * D);
        write_value(s, head_at(s, slot, KV_VALUE, page, h), at, value + h * D);
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
