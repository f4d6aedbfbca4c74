/* Text to ids: cut out added tokens, repair, NFC, split, merge. */
#include <string.h>

#include "base/mem.h"
#include "text/tok_impl.h"
#include "base/utf8.h"
#include "text/unicode.h"

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
    buf whole, plain; /* for tokens that are looked for behind NFC: that text, its plain ranges */
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
    buf_free(&c->whole);
    buf_free(&c->plain);
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

/* Makes s[n] well formed and normalised; the result is in one of c's buffers if that changed it. */
static err_code normalise(encoder *c, const char **s, size_t *n, err_info *e)
{
    err_code code = ERR_NONE;
    int changed = 0;
    if (utf8_valid(*s, *n) < *n) {
        c->repaired.n = 0;
        code = unicode_repair(*s, *n, &c->repaired, NULL, e);
        *s = c->repaired.data;
        *n = c->repaired.n;
    }
    if (c->t->nfc && !code) code = unicode_nfc(*s, *n, &c->nfc, &changed, e);
    if (changed) {
        *s = c->nfc.data;
        *n = c->nfc.n;
    }
    return code;
}

/* The pieces of text in which no added token is left. */
static err_code split_pieces(encoder *c, const char *s, size_t n, pretok_fn fn, void *ctx,
                             err_info *e)
{
    if (n == 0) return ERR_NONE;
    return c->t->pretok ? pretok_split(c->t->pretok, c->split, s, n, fn, ctx, e) : fn(ctx, s, n, e);
}

static err_code split_text(encoder *c, const char *s, size_t n, pretok_fn fn, void *ctx,
                           err_info *e)
{
    err_code code = normalise(c, &s, &n, e);
    return code ? code : split_pieces(c, s, n, fn, ctx, e);
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

/* ---- added tokens ----------------------------------------------------------------------- */

/* A stretch of text and the runs in it in which added tokens are not looked for. */
typedef struct stretch {
    const char *text;
    size_t begin, end; /* in text */
    const tok_range *plain;
    size_t plain_begin, plain_end; /* which of plain meet [begin, end) */
} stretch;

static err_code append_normalised(encoder *c, const char *s, size_t n, err_info *e)
{
    err_code code = normalise(c, &s, &n, e);
    return code ? code : buf_append(&c->whole, s, n, e);
}

/* Whether repair and NFC treat what stands before this byte by itself: NFC combines no character
 * below U+0300 with the one before it, and a byte that begins a character ends a broken one. */
static int is_cut(const encoder *c, char byte)
{
    return c->t->nfc ? (uint8_t)byte < 0x80 : ((uint8_t)byte & 0xc0) != 0x80;
}

/* Normalises a stretch into c->whole and takes its plain ranges along into c->plain. Their ends are
 * moved out to where the text can be cut, but never over an ASCII character in front, the one that
 * a token may end with: it is still there only if no mark of the range was composed with it. */
static err_code normalise_stretch(encoder *c, const stretch *s, err_info *e)
{
    size_t done = s->begin;
    err_code code = ERR_NONE;
    c->whole.n = c->plain.n = 0;
    for (size_t k = s->plain_begin; k < s->plain_end && !code; k++) {
        size_t from = s->plain[k].begin, to = s->plain[k].end;
        if (to <= done || from == to) continue;
        while (from > done && !is_cut(c, s->text[from])) from--;
        while (to < s->end && !is_cut(c, s->text[to])) to++;
        if (from < done) from = done;
        code = append_normalised(c, s->text + done, from - done, e);
        tok_range moved = {c->whole.n, c->whole.n};
        if (!code) code = append_normalised(c, s->text + from, to - from, e);
        if (code) break;
        const char *first = (const char *)c->whole.data + moved.begin;
        if (from < s->plain[k].begin && (uint8_t)*first < 0x80) moved.begin++;
        moved.end = c->whole.n;
        code = buf_append(&c->plain, &moved, sizeof moved, e);
        done = to;
    }
    return code ? code : append_normalised(c, s->text + done, s->end - done, e);
}

static err_code encode_stage(encoder *c, added_stage stage, const stretch *s, err_info *e);

/* What is left between the tokens of one stage. */
static err_code encode_between(encoder *c, added_stage stage, const stretch *s, err_info *e)
{
    if (s->begin == s->end) return ERR_NONE;
    const char *text = s->text + s->begin;
    size_t n = s->end - s->begin;
    if (stage == ADDED_NORMALIZED) return split_pieces(c, text, n, encode_piece, c, e);
    if (!(c->t->added.stages & ADDED_NORMALIZED)) return split_text(c, text, n, encode_piece, c, e);
    err_code code = normalise_stretch(c, s, e);
    stretch whole = {.text = c->whole.data,
                     .end = c->whole.n,
                     .plain = c->plain.data,
                     .plain_end = c->plain.n / sizeof(tok_range)};
    return code ? code : encode_stage(c, ADDED_NORMALIZED, &whole, e);
}

/* Raw tokens are looked for before repair: they are well formed themselves, so none begins or ends
 * inside a broken sequence. A token that would reach into a plain range is not one. */
static err_code encode_stage(encoder *c, added_stage stage, const stretch *s, err_info *e)
{
    stretch between = *s;
    size_t i = s->begin, k = s->plain_begin;
    err_code code = ERR_NONE;
    while (i < s->end && !code) {
        while (k < s->plain_end && (s->plain[k].end <= i || s->plain[k].end == s->plain[k].begin))
            k++;
        size_t limit = k < s->plain_end ? s->plain[k].begin : s->end, at = 0, len = 0;
        if (limit <= i) {
            i = s->plain[k].end;
            continue;
        }
        int32_t id = added_find(&c->t->added, stage, s->text + i, limit - i, &at, &len);
        if (id < 0) {
            i = limit;
            continue;
        }
        between.end = i + at;
        between.plain_end = k;
        code = encode_between(c, stage, &between, e);
        if (!code) code = buf_append(&c->ids, &id, sizeof id, e);
        i += at + len;
        between.begin = i;
        between.plain_begin = k;
    }
    between.end = s->end;
    between.plain_end = s->plain_end;
    return code ? code : encode_between(c, stage, &between, e);
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
    stretch all = {.text = text, .end = n_bytes, .plain = plain, .plain_end = n_plain};
    if (!code)
        code = special ? encode_stage(&c, ADDED_RAW, &all, e)
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
