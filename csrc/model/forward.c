/* forward: Qwen3.5's text model, top to bottom.
 *
 *   x = embed[id]
 *   each layer:  x += mixer(norm(x));  x += ffn(norm(x))        mixer: Gated DeltaNet or attention
 *   logits = lm_head norm(x)
 *
 * Source of the mathematics: transformers, models/qwen3_5 and qwen3_5_moe. Everything is f32. */
#include "model/pass.h"

#include <string.h>

void pass_layer(pass *p, const layer_weights *w, int layer, int is_full, int slot, int64_t n)
{
    int64_t H = p->m->config.hidden_size;

    p->layer = layer;
    pass_norm(p, p->x, w->input_norm, n, p->u);
    pass_show(p, TAP_MIXER_IN, p->u, n, H, NULL);
    if (is_full)
        attn_mix(p, &w->attn, slot, n);
    else
        gdn_mix(p, &w->gdn, slot, n);
    pass_add(p, n);

    pass_norm(p, p->x, w->post_norm, n, p->u);
    pass_show(p, TAP_FFN_IN, p->u, n, H, NULL);
    ffn_mix(p, w, n);
    pass_add(p, n);
}

/* Row t0 of arrays that span the whole call; NULL stays NULL. */
static float *rows_from(float *base, int64_t row, int64_t width)
{
    return base ? base + row * width : NULL;
}

/* Rows of a batch that are rows t0.. of the `total` in `want`. */
typedef struct wanted {
    const ses_want *want;
    int64_t t0, total;
} wanted;

/* The residual stream as row `depth` of what `want` collects: 0 the embeddings, 1 after layer 0. */
static void take_hidden(const pass *p, const wanted *w, int depth, int64_t n)
{
    int64_t H = p->m->config.hidden_size;
    if (w->want->hidden)
        memcpy(w->want->hidden + (depth * w->total + w->t0) * H, p->x,
               (size_t)(n * H) * sizeof *p->x);
}

static void take_router(const pass *p, const wanted *w, int layer, int64_t n)
{
    const ses_want *want = w->want;
    int64_t k = p->m->config.n_experts_used, at = (layer * w->total + w->t0) * k;
    if (want->router_ids)
        memcpy(want->router_ids + at, p->expert_ids, (size_t)(n * k) * sizeof *want->router_ids);
    if (want->router_weights)
        memcpy(want->router_weights + at, p->expert_weights,
               (size_t)(n * k) * sizeof *want->router_weights);
}

/* From the residual stream to the logits: all that are wanted, and those after the last token. */
static void read_out(pass *p, ses *s, const wanted *w, int64_t n)
{
    const model *m = p->m;
    const ses_want *want = w->want;
    int64_t H = m->config.hidden_size, V = m->config.vocab_size;
    int last = w->t0 + n == w->total;
    float *final = rows_from(want->final, w->t0, H), *logits = rows_from(want->logits, w->t0, V);

    if (final || logits || last || want->nll) pass_norm(p, p->x, m->weights.norm, n, p->u);
    if (final) memcpy(final, p->u, (size_t)(n * H) * sizeof *final);
    if (logits) pass_linear(p, PROFILE_LM_HEAD, &m->weights.lm_head, p->u, n, logits);
    if (last && logits)
        memcpy(s->logits, logits + (n - 1) * V, (size_t)V * sizeof *logits);
    else if (last)
        pass_linear(p, PROFILE_LM_HEAD, &m->weights.lm_head, p->u + (n - 1) * H, 1, s->logits);
    if (want->nll) pass_score(p, p->u, n, want->targets + w->t0, want->nll + w->t0);
}

/* The logits after the last row of each span, from what the last norm put into p->u. */
static void read_out_parts(pass *p)
{
    const model *m = p->m;
    int64_t H = m->config.hidden_size, V = m->config.vocab_size;

    for (int first = 0; first < p->n_spans; first += SES_SCORE_ROWS) {
        int count = p->n_spans - first < SES_SCORE_ROWS ? p->n_spans - first : SES_SCORE_ROWS;
        const span *spans = p->spans + first;
        for (int i = 0; i < count; i++)
            memcpy(p->y + i * H, p->u + (spans[i].first + spans[i].n - 1) * H,
                   (size_t)H * sizeof *p->y);
        pass_linear(p, PROFILE_LM_HEAD, &m->weights.lm_head, p->y, count, p->scored);
        for (int i = 0; i < count; i++)
            memcpy(spans[i].s->logits, p->scored + i * V, (size_t)V * sizeof *p->scored);
    }
}

static void embed(pass *p, int64_t row, const int32_t *ids, int64_t n)
{
    const num_matrix *w = &p->m->weights.embed;
    for (int64_t i = 0; i < n; i++)
        p->m->ops->decode[w->mode](w, ids[i], p->x + (row + i) * w->cols);
    pass_lap(p, PROFILE_EMBED, n * (num_matrix_bytes(w) / w->rows));
}

/* Whether a batch is worth saving the states of its sessions for, to be cancelled. */
static int is_long(int64_t n, int n_spans)
{
    return n > n_spans && n > SES_FEW_ROWS;
}

/* From here to end_cancellable the batch may be cancelled, if that is worth it. */
static void begin_cancellable(pass *p, int64_t n, const cancel_flag *cancel)
{
    if (!cancel || !is_long(n, p->n_spans)) return;
    for (int i = 0; i < p->n_spans; i++) {
        ses_save_state(p->spans[i].s);
        pass_lap(p, PROFILE_SAVE, 2 * ses_state_bytes(p->spans[i].s));
    }
    pool_watch(p->m->pool, cancel);
}

/* False if it was cancelled, and then no session has changed. */
static int end_cancellable(pass *p)
{
    int is_cut = pool_is_cut(p->m->pool);
    pool_watch(p->m->pool, NULL);
    for (int i = 0; is_cut && i < p->n_spans; i++) ses_restore_state(p->spans[i].s);
    return !is_cut;
}

/* The batch's rows through all layers. */
static void run_layers(pass *p, int64_t n, const wanted *w)
{
    const model *m = p->m;
    const model_config *c = &m->config;

    if (w) take_hidden(p, w, 0, n);
    for (int layer = 0; layer < c->n_layers; layer++) {
        pass_layer(p, &m->weights.layers[layer], layer, c->is_full[layer], p->spans->s->slot[layer],
                   n);
        if (pool_is_cut(m->pool)) return;
        if (w) take_hidden(p, w, layer + 1, n);
        if (w) take_router(p, w, layer, n);
    }
}

static void append(const span *sp, const int32_t *ids)
{
    memcpy(sp->s->ids + sp->pos, ids, (size_t)sp->n * sizeof *ids);
    sp->s->n_past = sp->pos + sp->n;
}

/* One batch of one session: n tokens, which are rows w->t0 on of what is wanted. */
static int run_batch(ses *s, const int32_t *ids, int64_t n, const wanted *w,
                     const cancel_flag *cancel)
{
    pass *p = s->m->pass;
    span sp = {s, s->n_past, 0, n};

    pass_begin(p, &sp, 1);
    embed(p, 0, ids, n);
    begin_cancellable(p, n, cancel);
    run_layers(p, n, w);
    int done = end_cancellable(p);
    if (done) {
        read_out(p, s, w, n);
        append(&sp, ids);
        if (w->t0 + n == w->total) s->logits_at = s->n_past;
    }
    pass_end(p);
    return done;
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
        wanted w = {want ? want : &nothing, t0, n};
        if (cancel_raised(cancel) || !run_batch(s, ids + t0, size, &w, cancel))
            return err_set(e, ERR_CANCELLED, "cancelled after %lld of %lld tokens", (long long)t0,
                           (long long)n);
    }
    return ERR_NONE;
}

/* The part goes on with the text where its session stands, and the token behind it is one. */
static int score_fits(const ses_part *part)
{
    const ses_score *score = part->score;
    int64_t pos = part->s->n_past;
    if (pos > score->n || part->n > score->n - pos) return 0;
    if (memcmp(part->ids, score->ids + pos, (size_t)part->n * sizeof *part->ids)) return 0;
    return pos + part->n == score->n ||
           !check_ids(&part->s->m->config, score->ids + pos + part->n, 1, NULL);
}

static err_code check_parts(const ses_part *parts, int n_parts, err_info *e)
{
    int64_t n = 0;
    for (int i = 0; i < n_parts; i++) {
        const ses_part *part = &parts[i];
        if (part->n < 1) return err_set(e, ERR_RANGE, "part %d has no tokens", i);
        if (part->s->m != parts->s->m)
            return err_set(e, ERR_RANGE, "part %d is of another model", i);
        for (int j = 0; j < i; j++)
            if (parts[j].s == part->s)
                return err_set(e, ERR_RANGE, "parts %d and %d are one session", j, i);
        if (ses_check(part->s, part->s->n_past, part->ids, part->n, e))
            return err_prefix(e, "part %d", i);
        if (part->score && !score_fits(part))
            return err_set(e, ERR_RANGE, "part %d is no piece of the text that is scored", i);
        if (part->n > SES_BATCH - n)
            return err_set(e, ERR_LIMIT, "more than %d tokens in a batch", SES_BATCH);
        n += part->n;
    }
    return ERR_NONE;
}

/* What is wanted of the parts beyond their last logits. */
static void score_parts(pass *p, const ses_part *parts)
{
    for (int i = 0; i < p->n_spans; i++)
        if (parts[i].score) pass_score_text(p, &p->spans[i], parts[i].score);
    if (pool_is_cut(p->m->pool)) return;
    for (int i = 0; i < p->n_spans; i++)
        if (parts[i].score && parts[i].score->sums) pass_sum(p, &p->spans[i], parts[i].score->sums);
}

err_code ses_eval_parts(const ses_part *parts, int n_parts, const cancel_flag *cancel, err_info *e)
{
    span spans[SES_BATCH];
    if (check_parts(parts, n_parts, e)) return e->code;
    if (n_parts < 1) return ERR_NONE;
    pass *p = parts->s->m->pass;
    int64_t n = 0;
    for (int i = 0; i < n_parts; n += parts[i++].n)
        spans[i] = (span){parts[i].s, parts[i].s->n_past, n, parts[i].n};
    pass_begin(p, spans, n_parts);
    for (int i = 0; i < n_parts; i++) embed(p, spans[i].first, parts[i].ids, parts[i].n);
    begin_cancellable(p, n, cancel);
    run_layers(p, n, NULL);
    pass_norm(p, p->x, p->m->weights.norm, n, p->u);
    score_parts(p, parts);
    int done = end_cancellable(p);
    if (done) read_out_parts(p);
    pass_end(p);
    if (!done) return err_set(e, ERR_CANCELLED, "cancelled a batch of %lld tokens", (long long)n);
    for (int i = 0; i < n_parts; i++) {
        append(&spans[i], parts[i].ids);
        parts[i].s->logits_at = parts[i].s->n_past;
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
    pass *p = m->pass;
    int64_t H = c->hidden_size;
    span sp = {s, pos, 0, n};

    for (int64_t i = 0; i < n; i++) {
        float *in = p->mtp_in + i * 2 * H;
        m->ops->decode[m->weights.embed.mode](&m->weights.embed, next_ids[i], in);
        m->ops->rms_norm(in, w->norm_embedding, H, c->rms_eps, in);
        m->ops->rms_norm(final + i * H, w->norm_hidden, H, c->rms_eps, in + H);
    }
    pass_begin(p, &sp, 1);
    pass_linear(p, PROFILE_MTP_FC, &w->fc, p->mtp_in, n, p->x);
    pass_layer(p, &w->layer, c->n_layers, 1, kv_mtp_slot(m), n);
    pass_norm(p, p->x, w->norm, n, p->u);
    if (hidden) memcpy(hidden, p->u, (size_t)(n * H) * sizeof *hidden);
    if (logits) pass_linear(p, PROFILE_LM_HEAD, &m->weights.lm_head, p->u, n, logits);
    pass_end(p);
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
