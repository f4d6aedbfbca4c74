/* session: memory of one timeline: cache and recurrent state. */
#include "model/pass.h"

#include <string.h>

#include "base/mem.h"

/* ---- opening -------------------------------------------------------------------------------- */

static size_t saved_bytes(const ses *s)
{
    return (size_t)(ses_S_floats(s) + ses_conv_floats(s)) * sizeof(float);
}

/* The pool of the session's codec, with room for a full context. */
static err_code open_kv(ses *s, err_info *e)
{
    kv_pool **kv = &s->m->kv[s->codec];
    if (!*kv) *kv = kv_pool_open(kv_page_bytes(s->m, s->codec), e);
    if (!*kv || kv_pool_promise(*kv, kv_n_pages(s->n_ctx), e)) return e->code;
    s->kv = *kv;
    return ERR_NONE;
}

static err_code open_into(ses *s, int single, err_info *e)
{
    const model_config *c = &s->m->config;
    for (int i = 0; i < c->n_layers; i++) s->n_linear += !c->is_full[i];
    if (single && s->n_linear) s->n_linear = 1;
    if (!s->m->pass && !(s->m->pass = pass_open(s->m, e))) return e->code;
    if (!(s->pages = mem_array((size_t)kv_n_pages(s->n_ctx), sizeof *s->pages, e)) ||
        !(s->slot = mem_array((size_t)c->n_layers, sizeof *s->slot, e)) ||
        !(s->S = mem_array((size_t)ses_S_floats(s), sizeof *s->S, e)) ||
        !(s->conv = mem_array((size_t)ses_conv_floats(s), sizeof *s->conv, e)) ||
        !(s->logits = mem_array((size_t)c->vocab_size, sizeof *s->logits, e)) ||
        !(s->ids = mem_pages((size_t)s->n_ctx * sizeof *s->ids, e)) ||
        !(s->saved = mem_pages(saved_bytes(s), e)))
        return e->code;
    for (int i = 0, n_seen[2] = {0}; !single && i < c->n_layers; i++)
        s->slot[i] = n_seen[c->is_full[i]]++;
    return open_kv(s, e);
}

static ses *open_session(model *m, const ses_options *options, int single, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    if (options->n_ctx < 1 || options->n_ctx > m->config.max_positions) {
        err_set(e, ERR_LIMIT, "context of %lld tokens: this model takes 1 to %d",
                (long long)options->n_ctx, m->config.max_positions);
        return NULL;
    }
    ses *s = mem_array(1, sizeof *s, e);
    if (!s) return NULL;
    s->m = m;
    s->codec = options->codec;
    s->n_ctx = options->n_ctx;
    if (open_into(s, single, e)) {
        ses_close(s);
        return NULL;
    }
    return s;
}

ses *ses_open(model *m, const ses_options *options, err_info *e)
{
    return open_session(m, options, 0, e);
}

ses *ses_open_single(model *m, const ses_options *options, err_info *e)
{
    return open_session(m, options, 1, e);
}

void ses_close(ses *s)
{
    if (!s) return;
    if (s->kv) {
        ses_drop_pages(s);
        kv_pool_return(s->kv, kv_n_pages(s->n_ctx));
    }
    mem_pages_free(s->ids, (size_t)s->n_ctx * sizeof *s->ids);
    mem_pages_free(s->saved, saved_bytes(s));
    mem_free(s->pages);
    mem_free(s->slot);
    mem_free(s->S);
    mem_free(s->conv);
    mem_free(s->logits);
    mem_free(s);
}

/* ---- looking -------------------------------------------------------------------------------- */

int64_t ses_n_past(const ses *s)
{
    return s->n_past;
}
int64_t ses_n_ctx(const ses *s)
{
    return s->n_ctx;
}
kv_codec ses_codec(const ses *s)
{
    return s->codec;
}
const int32_t *ses_ids(const ses *s)
{
    return s->ids;
}
float *ses_logits(ses *s)
{
    return s->n_past && s->logits_at == s->n_past ? s->logits : NULL;
}

static int n_full(const ses *s)
{
    return s->m->config.n_layers - s->n_linear;
}

int64_t ses_kv_bytes(const ses *s)
{
    return 2 * kv_row_bytes(s->m, s->codec) * (n_full(s) * s->n_past + s->n_mtp);
}

int64_t ses_state_bytes(const ses *s)
{
    return (ses_S_floats(s) + ses_conv_floats(s)) * (int64_t)sizeof(float);
}

const float *ses_recurrent(const ses *s, int layer)
{
    const model_config *c = &s->m->config;
    return s->S + (int64_t)s->slot[layer] * c->lin_v_heads * c->lin_v_dim * c->lin_k_dim;
}

void ses_conv_rows(const ses *s, int layer, float *out)
{
    const model_config *c = &s->m->config;
    int64_t n = (int64_t)(c->conv_kernel - 1) * config_conv_width(c);
    memcpy(out, s->conv + s->slot[layer] * n, (size_t)n * sizeof *out);
}

void ses_kv_row(const ses *s, int layer, int64_t pos, float *key, float *value)
{
    kv_read(s, s->slot[layer], pos, key, value);
}

void ses_profile(ses *s, int on)
{
    if (on) s->profile = (profile){0};
    s->is_profiled = on;
}

const profile *ses_profiled(const ses *s)
{
    return &s->profile;
}

/* ---- rewinding ------------------------------------------------------------------------------ */

void ses_drop_pages(ses *s)
{
    for (int64_t i = 0; i < kv_n_pages(s->n_ctx); i++) {
        kv_page_drop(s->kv, s->pages[i]);
        s->pages[i] = NULL;
    }
}

void ses_reset(ses *s)
{
    ses_drop_pages(s);
    memset(s->S, 0, (size_t)ses_S_floats(s) * sizeof *s->S);
    memset(s->conv, 0, (size_t)ses_conv_floats(s) * sizeof *s->conv);
    s->n_past = 0;
    s->n_mtp = 0;
    s->logits_at = 0;
}
