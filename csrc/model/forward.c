/* forward: Qwen3.5's text model, top to bottom.
 *
 *   x = embed[id]
 *   each layer:  x += mixer(norm(x));  x += ffn(norm(x))        mixer: Gated DeltaNet or attention
 *   logits = lm_head norm(x)
 *
 * Source of the mathematics: transformers, models/qwen3_5 and qwen3_5_moe. Everything is f32. */
#include "model/pass.h"

#include <string.h>

static void add_rows(float *x, const float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

static void run_layer(ses *s, const layer_weights *w, int is_full, int slot, int64_t pos, int64_t n)
{
    scratch *t = &s->t;
    const model_config *c = &s->m->config;
    int64_t H = c->hidden_size;

    pass_norm(s, t->x, w->input_norm, n, t->u);
    if (is_full)
        attn_mix(s, &w->attn, slot, pos, n);
    else
        gdn_mix(s, &w->gdn, slot, n);
    add_rows(t->x, t->y, n * H);

    pass_norm(s, t->x, w->post_norm, n, t->u);
    ffn_mix(s, w, n);
    add_rows(t->x, t->y, n * H);
}

/* Row t0 of arrays that span the whole call; NULL stays NULL. */
static float *rows_from(float *base, int64_t row, int64_t width)
{
    return base ? base + row * width : NULL;
}

typedef struct score_loop {
    ses *s;
    const int32_t *targets; /* [n] */
    const int64_t *rows;    /* which of them each scored row is */
    float *nll;
} score_loop;

static void score_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const score_loop *l = ctx;
    int64_t V = l->s->m->config.vocab_size;
    for (int64_t i = begin; i < end; i++) {
        float *logits = l->s->t.scored + i * V, target = logits[l->targets[l->rows[i]]];
        l->nll[l->rows[i]] = l->s->m->ops->softmax(logits, V) - target;
    }
}

/* nll of the batch's targets; t.u holds the rows that lm_head reads. */
static void score_batch(ses *s, int64_t n, const int32_t *targets, float *nll)
{
    int64_t H = s->m->config.hidden_size, rows[SES_SCORE_ROWS];
    score_loop l = {s, targets, rows, nll};
    for (int64_t i = 0, count = 0; i < n; i++) {
        nll[i] = 0;
        if (targets[i] >= 0) {
            memcpy(s->t.y + count * H, s->t.u + i * H, (size_t)H * sizeof(float));
            rows[count++] = i;
        }
        if (count == SES_SCORE_ROWS || (i == n - 1 && count)) {
            pass_linear(s, &s->m->weights.lm_head, s->t.y, count, s->t.scored);
            pool_for(s->m->pool, count, 1, score_rows, &l);
            count = 0;
        }
    }
}

/* The residual stream as row `depth` of what `want` collects: 0 the embeddings, 1 after layer 0. */
static void take_hidden(const ses *s, const ses_want *want, int depth, int64_t t0, int64_t n,
                        int64_t total)
{
    int64_t H = s->m->config.hidden_size;
    if (want->hidden)
        memcpy(want->hidden + (depth * total + t0) * H, s->t.x,
               (size_t)(n * H) * sizeof *want->hidden);
}

static void take_router(const ses *s, const ses_want *want, int layer, int64_t t0, int64_t n,
                        int64_t total)
{
    int64_t k = s->m->config.n_experts_used, at = (layer * total + t0) * k;
    if (want->router_ids)
        memcpy(want->router_ids + at, s->t.expert_ids, (size_t)(n * k) * sizeof *want->router_ids);
    if (want->router_weights)
        memcpy(want->router_weights + at, s->t.expert_weights,
               (size_t)(n * k) * sizeof *want->router_weights);
}

/* From the residual stream to the logits: all that are wanted, and those after the last token. */
static void read_out(ses *s, const ses_want *want, int64_t t0, int64_t n, int64_t total)
{
    const model *m = s->m;
    scratch *t = &s->t;
    int64_t H = m->config.hidden_size, V = m->config.vocab_size;
    int last = t0 + n == total;
    float *final = rows_from(want->final, t0, H), *logits = rows_from(want->logits, t0, V);

    if (final || logits || last || want->nll) pass_norm(s, t->x, m->weights.norm, n, t->u);
    if (final) memcpy(final, t->u, (size_t)(n * H) * sizeof *final);
    if (logits) pass_linear(s, &m->weights.lm_head, t->u, n, logits);
    if (last && logits)
        memcpy(s->logits, logits + (n - 1) * V, (size_t)V * sizeof *logits);
    else if (last)
        pass_linear(s, &m->weights.lm_head, t->u + (n - 1) * H, 1, s->logits);
    if (want->nll) score_batch(s, n, want->targets + t0, want->nll + t0);
}

/* One batch: n tokens at s->n_past, which are rows t0 .. t0+n-1 of `total` in `want`. False if it
 * was cancelled, and then nothing has changed. A single token is not worth saving a state for. */
static int run_batch(ses *s, const int32_t *ids, int64_t n, int64_t t0, int64_t total,
                     const ses_want *want, const cancel_flag *cancel)
{
    const model *m = s->m;
    const model_config *c = &m->config;
    int64_t pos = s->n_past;

    for (int64_t i = 0; i < n; i++)
        m->ops->decode[m->weights.embed.mode](&m->weights.embed, ids[i],
                                              s->t.x + i * c->hidden_size);
    rope_prepare(s, pos, n);
    kv_own(s, pos, n);
    if (n == 1) cancel = NULL;
    if (cancel) ses_save_state(s);

    take_hidden(s, want, 0, t0, n, total);
    for (int layer = 0; layer < c->n_layers; layer++) {
        if (cancel_raised(cancel)) {
            ses_restore_state(s);
            return 0;
        }
        run_layer(s, &m->weights.layers[layer], c->is_full[layer], s->slot[layer], pos, n);
        take_hidden(s, want, layer + 1, t0, n, total);
        take_router(s, want, layer, t0, n, total);
    }
    read_out(s, want, t0, n, total);

    memcpy(s->ids + pos, ids, (size_t)n * sizeof *ids);
    s->n_past = pos + n;
    if (t0 + n == total) s->logits_at = s->n_past;
    return 1;
}

static err_code check_ids(const model_config *c, const int32_t *ids, int64_t n, err_info *e)
{
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= c->vocab_size)
            return err_set(e, ERR_RANGE, "token id %d at position %lld is not below %d", ids[i],
                           (long long)i, c->vocab_size);
    return ERR_NONE;
}

err_code ses_check(const ses *s, int64_t past, const int32_t *ids, int64_t n, err_info *e)
{
    if (check_ids(&s->m->config, ids, n, e)) return e->code;
    if (n > s->n_ctx - past)
        return err_set(e, ERR_LIMIT, "context is full: %lld tokens past, %lld more, room for %lld",
                       (long long)past, (long long)n, (long long)s->n_ctx);
    return ERR_NONE;
}

err_code ses_eval(ses *s, const int32_t *ids, int64_t n, const ses_want *want,
                  const cancel_flag *cancel, err_info *e)
{
    static const ses_want nothing;
    if (ses_check(s, s->n_past, ids, n, e)) return e->code;
    for (int64_t i = 0; want && want->nll && i < n; i++)
        if (want->targets[i] >= s->m->config.vocab_size)
            return err_set(e, ERR_RANGE, "target id %d at position %lld is not below %d",
                           want->targets[i], (long long)i, s->m->config.vocab_size);
    for (int64_t t0 = 0; t0 < n; t0 += SES_BATCH) {
        int64_t size = n - t0 < SES_BATCH ? n - t0 : SES_BATCH;
        if (cancel_raised(cancel) ||
            !run_batch(s, ids + t0, size, t0, n, want ? want : &nothing, cancel))
            return err_set(e, ERR_CANCELLED, "cancelled after %lld of %lld tokens", (long long)t0,
                           (long long)n);
    }
    return ERR_NONE;
}

/* The block of Qwen3.5's checkpoints under mtp.*: u = fc [norm(embed(next)) ; norm(final)], one
 * attention layer with its own cache, norm, the trunk's head (vLLM, models/qwen3_5_mtp.py). */
static void run_mtp(ses *s, int64_t pos, const float *final, const int32_t *next_ids, int64_t n,
                    float *hidden, float *logits)
{
    const model *m = s->m;
    const mtp_weights *w = &m->weights.mtp;
    const model_config *c = &m->config;
    scratch *t = &s->t;
    int64_t H = c->hidden_size;

    for (int64_t i = 0; i < n; i++) {
        float *in = t->mtp_in + i * 2 * H;
        m->ops->decode[m->weights.embed.mode](&m->weights.embed, next_ids[i], in);
        m->ops->rms_norm(in, w->norm_embedding, H, c->rms_eps, in);
        m->ops->rms_norm(final + i * H, w->norm_hidden, H, c->rms_eps, in + H);
    }
    pass_linear(s, &w->fc, t->mtp_in, n, t->x);
    rope_prepare(s, pos, n);
    kv_own(s, pos, n);
    run_layer(s, &w->layer, 1, kv_mtp_slot(m), pos, n);
    pass_norm(s, t->x, w->norm, n, t->u);
    if (hidden) memcpy(hidden, t->u, (size_t)(n * H) * sizeof *hidden);
    if (logits) pass_linear(s, &m->weights.lm_head, t->u, n, logits);
}

err_code ses_mtp(ses *s, int64_t first, const float *final, const int32_t *next_ids, int64_t n,
                 float *hidden, float *logits, err_info *e)
{
    const model_config *c = &s->m->config;
    if (!s->m->weights.mtp.present)
        return err_set(e, ERR_UNSUPPORTED, "this checkpoint has no multi-token prediction block");
    if (check_ids(c, next_ids, n, e)) return e->code;
    if (first < 0 || first > s->n_mtp)
        return err_set(e, ERR_RANGE, "MTP row %lld does not follow the %lld rows given so far",
                       (long long)first, (long long)s->n_mtp);
    if (n > s->n_ctx - first)
        return err_set(e, ERR_LIMIT, "context is full: MTP rows %lld to %lld, room for %lld",
                       (long long)first, (long long)(first + n), (long long)s->n_ctx);
    for (int64_t t0 = 0; t0 < n; t0 += SES_BATCH) {
        int64_t size = n - t0 < SES_BATCH ? n - t0 : SES_BATCH;
        run_mtp(s, first + t0, final + t0 * c->hidden_size, next_ids + t0, size,
                rows_from(hidden, t0, c->hidden_size), rows_from(logits, t0, c->vocab_size));
        s->n_mtp = first + t0 + size;
    }
    return ERR_NONE;
}
