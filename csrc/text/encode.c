/* Text to ids: cut out added tokens, repair, NFC, split, merge. */
#include <string.h>

#include "base/mem.h"
#include "text/tok_impl.h"
#include "text/utf8.h"

/* Repair and NFC each make at most three bytes of one, so that positions fit 32 bits. */
#define MOST_BYTES ((size_t)1 << 30)

/* Short pieces come again and again; their ids are copied from the first time. Within one call
 * only: a tokenizer is shared by threads and holds no state. */
typedef struct cached {
    union {
        struct {
            char bytes[15];
            uint8_t n;
        };
        uint64_t words[2];
    } piece;
    uint32_t at, n_ids; /* in the ids made so far */
} cached;

enum { CACHE_FEWEST = 64, CACHE_MOST = 8192 };

typedef struct encoder {
    const tok *t;
    pretok_work *split;
    bpe_work merge;
    buf ids, repaired, nfc;
    cached *cache;
    uint32_t cache_mask;
} encoder;

static void encoder_close(encoder *c)
{
    pretok_work_close(c->split);
    bpe_work_free(&c->merge);
    buf_free(&c->ids);
    buf_free(&c->repaired);
    buf_free(&c->nfc);
    mem_free(c->cache);
}

static err_code encoder_open(encoder *c, const tok *t, size_t n_bytes, err_info *e)
{
    uint32_t n = CACHE_FEWEST;
    while (n < CACHE_MOST && n < n_bytes / 8) n *= 2;
    *c = (encoder){.t = t, .cache_mask = n - 1};
    c->cache = mem_array(n, sizeof *c->cache, e);
    if (!c->cache || buf_reserve(&c->ids, (n_bytes / 4 + 1) * sizeof(int32_t), e))
        return ERR_MEMORY;
    if (t->pretok) c->split = pretok_work_open(t->pretok, e);
    return t->pretok && !c->split ? ERR_MEMORY : ERR_NONE;
}

static cached *cache_slot(encoder *c, const cached *key)
{
    uint64_t h = (key->piece.words[0] ^ key->piece.words[1] * UINT64_C(0xff51afd7ed558ccd)) *
                 UINT64_C(0x9e3779b97f4a7c15);
    return &c->cache[(uint32_t)(h >> 32) & c->cache_mask];
}

static err_code encode_piece(void *ctx, const char *piece, size_t n, err_info *e)
{
    encoder *c = ctx;
    const tok *t = c->t;
    cached key = {.at = (uint32_t)(c->ids.n / sizeof(int32_t))};
    if (n > sizeof key.piece.bytes)
        return bpe_encode(&t->bpe, &t->vocab, piece, n, &c->merge, &c->ids, e);
    memcpy(key.piece.bytes, piece, n);
    key.piece.n = (uint8_t)n;
    cached *slot = cache_slot(c, &key);
    if (memcmp(slot->piece.words, key.piece.words, sizeof key.piece.words) == 0) {
        size_t bytes = slot->n_ids * sizeof(int32_t);
        err_code code = buf_reserve(&c->ids, bytes, e);
        if (code) return code;
        char *ids = c->ids.data;
        memcpy(ids + c->ids.n, ids + slot->at * sizeof(int32_t), bytes);
        c->ids.n += bytes;
        return ERR_NONE;
    }
    err_code code = bpe_encode(&t->bpe, &t->vocab, piece, n, &c->merge, &c->ids, e);
    key.n_ids = (uint32_t)(c->ids.n / sizeof(int32_t)) - key.at;
    if (!code) *slot = key;
    return code;
}

/* Repairs and normalises s[n], which holds no added tokens, and hands its pieces to fn. */
static err_code split_text(encoder *c, const char *s, size_t n, pretok_fn fn, void *ctx,
                           err_info *e)
{
    err_code code = ERR_NONE;
    if (n == 0) return code;
    if (utf8_valid(s, n) < n) {
        c->repaired.n = 0;
        code = utf8_repair(s, n, &c->repaired, NULL, e);
        s = c->repaired.data;
        n = c->repaired.n;
    }
    if (c->t->nfc && !code) {
        int changed;
        code = utf8_nfc(s, n, &c->nfc, &changed, e);
        if (changed) {
            s = c->nfc.data;
            n = c->nfc.n;
        }
    }
    if (code) return code;
    return c->t->pretok ? pretok_split(c->t->pretok, c->split, s, n, fn, ctx, e)
                        : fn(ctx, s, n, e);
}

static err_code check_ranges(size_t n_bytes, const tok_range *plain, size_t n_plain, err_info *e)
{
    size_t last = 0;
    for (size_t k = 0; k < n_plain; k++) {
        if (plain[k].begin < last || plain[k].end < plain[k].begin || plain[k].end > n_bytes)
            return err_set(e, ERR_RANGE,
                           "plain range %zu, bytes [%zu, %zu) of %zu, is not inside the text or "
                           "not behind the one before it",
                           k, plain[k].begin, plain[k].end, n_bytes);
        last = plain[k].end;
    }
    return ERR_NONE;
}

/* Added tokens are looked for in the raw bytes, before repair: they are well formed themselves, so
 * none begins or ends inside a broken sequence, and `plain` keeps its meaning. A token that would
 * reach into a plain range is not one. */
static err_code encode_special(encoder *c, const char *text, size_t n, const tok_range *plain,
                               size_t n_plain, err_info *e)
{
    size_t done = 0, i = 0, k = 0;
    err_code code = ERR_NONE;
    while (i < n && !code) {
        while (k < n_plain && (plain[k].end <= i || plain[k].end == plain[k].begin)) k++;
        size_t limit = k < n_plain ? plain[k].begin : n, at = 0, len = 0;
        if (limit <= i) {
            i = plain[k].end;
            continue;
        }
        int32_t id = added_find(&c->t->added, text + i, limit - i, &at, &len);
        if (id < 0) {
            i = limit;
            continue;
        }
        code = split_text(c, text + done, i + at - done, encode_piece, c, e);
        if (!code) code = buf_append(&c->ids, &id, sizeof id, e);
        i = done = i + at + len;
    }
    return code ? code : split_text(c, text + done, n - done, encode_piece, c, e);
}

static err_code check_length(size_t n_bytes, err_info *e)
{
    if (n_bytes <= MOST_BYTES) return ERR_NONE;
    return err_set(e, ERR_LIMIT, "text of %zu bytes; at most %zu can be encoded at once", n_bytes,
                   MOST_BYTES);
}

err_code tok_encode(const tok *t, const char *text, size_t n_bytes, int special,
                    const tok_range *plain, size_t n_plain, int32_t **ids, size_t *n_ids,
                    err_info *e)
{
    encoder c;
    *ids = NULL;
    *n_ids = 0;
    err_code code = check_length(n_bytes, e);
    if (!code) code = check_ranges(n_bytes, plain, n_plain, e);
    if (code) return code;
    code = encoder_open(&c, t, n_bytes, e);
    if (!code)
        code = special ? encode_special(&c, text, n_bytes, plain, n_plain, e)
                       : split_text(&c, text, n_bytes, encode_piece, &c, e);
    if (!code) {
        *ids = c.ids.data;
        *n_ids = c.ids.n / sizeof **ids;
        c.ids = (buf){0};
    }
    encoder_close(&c);
    return code;
}

err_code tok_split(const tok *t, const char *text, size_t n_bytes, tok_piece_fn fn, void *ctx,
                   err_info *e)
{
    encoder c;
    err_code code = check_length(n_bytes, e);
    if (code) return code;
    code = encoder_open(&c, t, 0, e);
    if (!code) code = split_text(&c, text, n_bytes, fn, ctx, e);
    encoder_close(&c);
    return code;
}
