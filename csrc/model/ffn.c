/* ffn: the feed-forward half of a layer, dense or mixture of experts (transformers'
 * Qwen3_5MoeSparseMoeBlock).
 *
 *   mlp(u) = W_down (silu(W_gate u) * (W_up u))
 *   dense: y = mlp(u)
 *   MoE:   p = softmax(W_router u); the k largest, renormalised to sum 1
 *          y = sum_e p_e mlp_e(u) + sigmoid(W_s u) mlp_shared(u) */
#include "model/pass.h"

#include <string.h>

/* The k largest of logits [E] into ids, best first, equal ones by index; their softmax into
 * shares. Softmax over all E followed by renormalising over the chosen is the same function. */
static void choose_experts(const float *logits, int E, int k, int32_t *ids, float *shares)
{
    for (int n = 0; n < k; n++) {
        int best = -1;
        for (int i = 0; i < E; i++) {
            int taken = 0;
            for (int j = 0; j < n; j++) taken |= ids[j] == i;
            if (!taken && (best < 0 || logits[i] > logits[best])) best = i;
        }
        ids[n] = best;
    }
    float sum = 0;
    for (int n = 0; n < k; n++) sum += shares[n] = kern_expf(logits[ids[n]] - logits[ids[0]]);
    for (int n = 0; n < k; n++) shares[n] /= sum;
}

static void choose_loop(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    ses *s = ctx;
    int E = s->m->config.n_experts, k = s->m->config.n_experts_used;
    for (int64_t i = begin; i < end; i++)
        choose_experts(s->t.router + i * E, E, k, s->t.expert_ids + i * k,
                       s->t.expert_weights + i * k);
}

/* Sorts the n*k (token, slot) pairs by expert, so that each expert's inputs are contiguous. */
static void sort_by_expert(ses *s, int64_t n)
{
    const model_config *c = &s->m->config;
    scratch *t = &s->t;
    int64_t E = c->n_experts, pairs = n * c->n_experts_used;
    int32_t *first = t->expert_first;

    memset(first, 0, (size_t)(E + 1) * sizeof *first);
    for (int64_t i = 0; i < pairs; i++) first[t->expert_ids[i] + 1]++;
    for (int64_t e = 0; e < E; e++) first[e + 1] += first[e];
    for (int64_t i = 0; i < pairs; i++) t->expert_rows[i] = first[t->expert_ids[i]]++;
    for (int64_t e = E; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
}

typedef struct row_loop {
    ses *s;
    int64_t width;
    int64_t shared_row; /* first row of the shared expert */
} row_loop;

static void gather_inputs(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    ses *s = ctx;
    int64_t H = s->m->config.hidden_size, k = s->m->config.n_experts_used;
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < k; j++)
            memcpy(s->t.xe + s->t.expert_rows[i * k + j] * H, s->t.u + i * H,
                   (size_t)H * sizeof(float));
}

static void gate_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const row_loop *l = ctx;
    for (int64_t r = begin; r < end; r++)
        l->s->m->ops->silu_mul(l->s->t.gate + r * l->width, l->s->t.up + r * l->width, l->width);
}

/* y = sum of the chosen experts' outputs, best first, then the shared one's. */
static void combine_outputs(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const row_loop *l = ctx;
    const ses *s = l->s;
    const scratch *t = &s->t;
    int64_t H = s->m->config.hidden_size, k = s->m->config.n_experts_used;
    for (int64_t i = begin; i < end; i++) {
        float *y = t->y + i * H;
        memset(y, 0, (size_t)H * sizeof *y);
        for (int64_t j = 0; j < k; j++)
            s->m->ops->axpy(t->expert_weights[i * k + j], t->down + t->expert_rows[i * k + j] * H,
                            y, H);
        s->m->ops->axpy(kern_sigmoidf(t->shared[i]), t->down + (l->shared_row + i) * H, y, H);
    }
}

static void dense_mix(ses *s, const mlp_weights *w, int64_t n)
{
    scratch *t = &s->t;
    int64_t H = s->m->config.hidden_size, I = s->m->config.intermediate_size;
    kern_job jobs[] = {{&w->gate_proj, t->u, t->gate, H, n, I},
                       {&w->up_proj, t->u, t->up, H, n, I}};
    kern_linear_jobs(s->m->pool, s->m->ops, jobs, 2, t->kern_cols, t->kern);
    row_loop l = {s, I, 0};
    pool_for(s->m->pool, n, 4, gate_rows, &l);
    pass_linear(s, &w->down_proj, t->gate, n, t->y);
}

static void moe_mix(ses *s, const layer_weights *w, int64_t n)
{
    const model_config *c = &s->m->config;
    scratch *t = &s->t;
    int64_t H = c->hidden_size, I = c->moe_intermediate_size, Is = c->shared_intermediate_size;
    int64_t routed = n * c->n_experts_used, n_jobs = 0;
    kern_job route[] = {{&w->router, t->u, t->router, H, n, c->n_experts},
                        {&w->shared_gate, t->u, t->shared, H, n, 1}};

    kern_linear_jobs(s->m->pool, s->m->ops, route, 2, t->kern_cols, t->kern);
    pool_for(s->m->pool, n, 4, choose_loop, s);
    sort_by_expert(s, n);
    pool_for(s->m->pool, n, 4, gather_inputs, s);

    /* The shared expert's rows follow the routed ones in gate and up; its width may differ. */
    float *shared_gate = t->gate + routed * I, *shared_up = t->up + routed * I;
    for (int64_t e = 0; e < c->n_experts; e++) {
        int64_t first = t->expert_first[e], count = t->expert_first[e + 1] - first;
        if (!count) continue;
        const float *x = t->xe + first * H;
        t->jobs[n_jobs++] =
            (kern_job){&w->experts[e].gate_proj, x, t->gate + first * I, H, count, I};
        t->jobs[n_jobs++] = (kern_job){&w->experts[e].up_proj, x, t->up + first * I, H, count, I};
    }
    t->jobs[n_jobs++] = (kern_job){&w->mlp.gate_proj, t->u, shared_gate, H, n, Is};
    t->jobs[n_jobs++] = (kern_job){&w->mlp.up_proj, t->u, shared_up, H, n, Is};
    kern_linear_jobs(s->m->pool, s->m->ops, t->jobs, n_jobs, t->kern_cols, t->kern);

    row_loop l = {s, I, routed};
    pool_for(s->m->pool, routed, 8, gate_rows, &l);
    for (int64_t i = 0; i < n; i++)
        s->m->ops->silu_mul(shared_gate + i * Is, shared_up + i * Is, Is);

    n_jobs = 0;
    for (int64_t e = 0; e < c->n_experts; e++) {
        int64_t first = t->expert_first[e], count = t->expert_first[e + 1] - first;
        if (!count) continue;
        t->jobs[n_jobs++] = (kern_job){
            &w->experts[e].down_proj, t->gate + first * I, t->down + first * H, I, count, H};
    }
    t->jobs[n_jobs++] = (kern_job){&w->mlp.down_proj, shared_gate, t->down + routed * H, Is, n, H};
    kern_linear_jobs(s->m->pool, s->m->ops, t->jobs, n_jobs, t->kern_cols, t->kern);
    pool_for(s->m->pool, n, 4, combine_outputs, &l);
}

void ffn_mix(ses *s, const layer_weights *w, int64_t n)
{
    if (s->m->config.is_moe)
        moe_mix(s, w, n);
    else
        dense_mix(s, &w->mlp, n);
}
