/* Ids to text, whole and one by one. An added token stands for its own characters, every other
 * entry for bytes; characters may span tokens. */
#include <string.h>

#include "base/mem.h"
#include "text/tok_impl.h"
#include "base/utf8.h"
#include "text/unicode.h"

static err_code append_token(const tok *t, int32_t id, int skip_special, buf *out, err_info *e)
{
    if (!tok_has(t, id))
        return err_set(e, ERR_RANGE, "token id %d is not in the vocabulary", (int)id);
    if (skip_special && (t->vocab.entries[id].flags & VOCAB_SPECIAL)) return ERR_NONE;
    size_t n;
    const char *bytes = vocab_bytes(&t->vocab, id, &n);
    return buf_append(out, bytes, n, e);
}

err_code tok_decode(const tok *t, const int32_t *ids, size_t n_ids, int skip_special, char **text,
                    size_t *n_bytes, err_info *e)
{
    buf raw = {0}, whole = {0};
    *text = NULL;
    *n_bytes = 0;
    err_code c = buf_reserve(&raw, 1, e);
    for (size_t i = 0; i < n_ids && !c; i++) {
        c = append_token(t, ids[i], skip_special, &raw, e);
        if (c) err_prefix(e, "entry %zu", i);
    }
    if (!c && utf8_valid(raw.data, raw.n) < raw.n) {
        c = unicode_repair(raw.data, raw.n, &whole, NULL, e);
        buf_free(&raw);
        raw = whole;
        whole = (buf){0};
    }
    if (c) {
        buf_free(&raw);
        return c;
    }
    *text = raw.data;
    *n_bytes = raw.n;
    return ERR_NONE;
}

struct tok_stream {
    const tok *t;
    int skip_special;
    buf raw;   /* bytes held back, then those of the token at hand */
    buf shown; /* what the last call gave out */
};

tok_stream *tok_stream_open(const tok *t, int skip_special, err_info *e)
{
    tok_stream *s = mem_array(1, sizeof *s, e);
    if (!s) return NULL;
    s->t = t;
    s->skip_special = skip_special;
    return s;
}

void tok_stream_close(tok_stream *s)
{
    if (!s) return;
    buf_free(&s->raw);
    buf_free(&s->shown);
    mem_free(s);
}

static err_code show(tok_stream *s, int at_end, const char **text, size_t *n_bytes, err_info *e)
{
    size_t held = 0;
    s->shown.n = 0;
    err_code c = buf_reserve(&s->shown, 1, e);
    if (!c && s->raw.n)
        c = unicode_repair(s->raw.data, s->raw.n, &s->shown, at_end ? NULL : &held, e);
    if (c) return c;
    char *raw = s->raw.data;
    if (held) memmove(raw, raw + s->raw.n - held, held);
    s->raw.n = held;
    *text = s->shown.data;
    *n_bytes = s->shown.n;
    return ERR_NONE;
}

err_code tok_stream_step(tok_stream *s, int32_t id, const char **text, size_t *n_bytes, err_info *e)
{
    err_code c = append_token(s->t, id, s->skip_special, &s->raw, e);
    return c ? c : show(s, 0, text, n_bytes, e);
}

err_code tok_stream_end(tok_stream *s, const char **text, size_t *n_bytes, err_info *e)
{
    return show(s, 1, text, n_bytes, e);
}
