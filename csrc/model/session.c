/* session: memory of one timeline: cache, recurrent state, scratch. */
#include "model/pass.h"

#include <string.h>

#include "base/mem.h"

/* ---- opening -------------------------------------------------------------------------------- */

/* A first pass with base NULL adds up sizes, a second one hands out pieces of the arena. */
typedef struct layout {
    char *base;
    size_t n_bytes;
    int overflow;
} layout;

static void *take(layout *l, int64_t n, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow((size_t)n, size, &bytes) ||
        __builtin_add_overflow(l->n_bytes, (bytes + 63) & ~(size_t)63, &bytes)) {
        l->overflow = 1;
        return NULL;
    }
    void *p = l->base ? l->base + l->n_bytes : NULL;
    l->n_bytes = bytes;
    return p;
}

static int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Widest input of any matrix of the model. */
static int64_t widest_matrix(const model_config *c)
{
    int64_t cols = max64(2 * (int64_t)c->hidden_size, config_value_width(c));
    cols = max64(cols, (int64_t)c->n_heads * c->head_dim);
    cols = max64(cols, max64(c->intermediate_size, c->moe_intermediate_size));
    return max64(cols, c->shared_intermediate_size);
}

static void lay_out(ses *s, layout *l)
{
    const model_config *c = &s->m->config;
    scratch *t = &s->t;
    int64_t n = s->n_ctx < SES_BATCH ? s->n_ctx : SES_BATCH;
    int64_t H = c->hidden_size, C = config_conv_width(c), D = c->head_dim, K = c->conv_kernel;
    int64_t Nv = c->lin_v_heads, kv_width = (int64_t)c->n_kv_heads * D, E = c->n_experts;
    int64_t pairs = n * c->n_experts_used, workers = pool_n_threads(s->m->pool);
    int64_t ffn = c->is_moe ? pairs * c->moe_intermediate_size + n * c->shared_intermediate_size
                            : n * c->intermediate_size;
    size_t f = sizeof(float);

    s->pages = take(l, kv_n_pages(s->n_ctx), sizeof *s->pages);
    s->slot = take(l, c->n_layers, sizeof *s->slot);
    s->S = take(l, s->n_linear * Nv * c->lin_v_dim * c->lin_k_dim, f);
    s->conv = take(l, s->n_linear * (K - 1) * C, f);
    s->logits = take(l, c->vocab_size, f);
    t->x = take(l, n * H, f);
    t->u = take(l, n * H, f);
    t->y = take(l, n * H, f);
    t->conv_in = take(l, (K - 1 + n) * C, f);
    t->conv_out = take(l, n * C, f);
    t->z = take(l, n * config_value_width(c), f);
    t->b = take(l, n * Nv, f);
    t->a = take(l, n * Nv, f);
    t->qg = take(l, n * c->n_heads * 2 * D, f);
    t->k = take(l, n * kv_width, f);
    t->v = take(l, n * kv_width, f);
    t->heads = take(l, n * c->n_heads * D, f);
    t->cos = take(l, n * c->rotary_dim / 2, f);
    t->sin = take(l, n * c->rotary_dim / 2, f);
    t->router = take(l, n * E, f);
    t->expert_ids = take(l, pairs, sizeof *t->expert_ids);
    t->expert_weights = take(l, pairs, f);
    t->expert_rows = take(l, pairs, sizeof *t->expert_rows);
    t->expert_first = take(l, E + 1, sizeof *t->expert_first);
    t->xe = take(l, pairs * H, f);
    t->gate = take(l, ffn, f);
    t->up = take(l, ffn, f);
    t->down = take(l, c->is_moe ? (pairs + n) * H : 0, f);
    t->shared = take(l, n, f);
    t->jobs = take(l, 2 * (E + 1), sizeof *t->jobs);
    t->mtp_in = take(l, s->m->weights.mtp.present ? n * 2 * H : 0, f);
    t->kern_cols = widest_matrix(c);
    t->kern = take(l, workers, (size_t)kern_scratch_bytes(t->kern_cols));
    t->kv_rows = take(l, workers * KERN_ROWS * D, f);
}

static size_t scores_bytes(const ses *s)
{
    const model_config *c = &s->m->config;
    return (size_t)(c->n_heads / c->n_kv_heads) * (size_t)s->n_ctx * sizeof(float) *
           (size_t)pool_n_threads(s->m->pool);
}

static size_t scored_bytes(const ses *s)
{
    return SES_SCORE_ROWS * (size_t)s->m->config.vocab_size * sizeof(float);
}

static size_t saved_bytes(const ses *s)
{
    return (size_t)(ses_S_floats(s) + ses_conv_floats(s)) * sizeof(float);
}

/* The pool of the session's codec, with room for a full context. */
static err_code open_kv(ses *s, err_info *e)
{
    kv_pool **kv = &s->m->kv[s->codec];
    int64_t row = kv_row_bytes(s->m, s->codec);
    if (!*kv) *kv = kv_pool_open(2 * kv_n_slots(s->m) * KV_PAGE_ROWS * row, e);
    if (!*kv || kv_pool_promise(*kv, kv_n_pages(s->n_ctx), e)) return e->code;
    s->kv = *kv;
    return ERR_NONE;
}

static err_code open_pages(ses *s, err_info *e)
{
    if (open_kv(s, e)) return e->code;
    if (!(s->ids = mem_pages((size_t)s->n_ctx * sizeof *s->ids, e))) return e->code;
    if (!(s->t.scores = mem_pages(scores_bytes(s), e))) return e->code;
    if (!(s->t.scored = mem_pages(scored_bytes(s), e))) return e->code;
    if (!(s->saved = mem_pages(saved_bytes(s), e))) return e->code;
    return ERR_NONE;
}

static err_code open_into(ses *s, err_info *e)
{
    const model_config *c = &s->m->config;
    for (int i = 0; i < c->n_layers; i++) s->n_linear += !c->is_full[i];
    layout l = {0};
    lay_out(s, &l);
    if (l.overflow) return err_set(e, ERR_MEMORY, "session scratch does not fit in memory");
    if (!(s->arena = mem_array(1, l.n_bytes, e))) return e->code;
    l = (layout){.base = s->arena};
    lay_out(s, &l);
    for (int i = 0, n_seen[2] = {0}; i < c->n_layers; i++) s->slot[i] = n_seen[c->is_full[i]]++;
    return open_pages(s, e);
}

ses *ses_open(model *m, const ses_options *options, err_info *e)
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
    if (open_into(s, e)) {
        ses_close(s);
        return NULL;
    }
    return s;
}

void ses_close(ses *s)
{
    if (!s) return;
    if (s->kv) {
        ses_drop_pages(s);
        kv_pool_return(s->kv, kv_n_pages(s->n_ctx));
    }
    mem_pages_free(s->ids, (size_t)s->n_ctx * sizeof *s->ids);
    mem_pages_free(s->t.scores, scores_bytes(s));
    mem_pages_free(s->t.scored, scored_bytes(s));
    mem_pages_free(s->saved, saved_bytes(s));
    mem_free(s->arena);
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
    const model_config *c = &s->m->config;
    int64_t D = c->head_dim, ld;
    for (int h = 0; h < c->n_kv_heads; h++) {
        float *k = key + h * D, *v = value + h * D;
        const float *row = kv_head_rows(s, s->slot[layer], KV_KEY, pos, 1, h, k, &ld);
        if (row != k) memcpy(k, row, (size_t)D * sizeof *k);
        row = kv_head_rows(s, s->slot[layer], KV_VALUE, pos, 1, h, v, &ld);
        if (row != v) memcpy(v, row, (size_t)D * sizeof *v);
    }
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
