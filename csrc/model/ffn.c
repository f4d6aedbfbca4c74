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
    for (int i = 0, n = 0; i < E; i++) {
        if (n == k && !(logits[i] > logits[ids[k - 1]])) continue;
        int at = n < k ? n++ : k - 1;
        for (; at > 0 && logits[i] > logits[ids[at - 1]]; at--) ids[at] = ids[at - 1];
        ids[at] = i;
    }
    float sum = 0;
    for (int n = 0; n < k; n++) sum += shares[n] = kern_expf(logits[ids[n]] - logits[ids[0]]);
    for (int n = 0; n < k; n++) shares[n] /= sum;
}

static void choose_loop(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    pass *p = ctx;
    int E = p->m->config.n_experts, k = p->m->config.n_experts_used;
    for (int64_t i = begin; i < end; i++)
        choose_experts(p->router + i * E, E, k, p->expert_ids + i * k, p->expert_weights + i * k);
}

/* Sorts the n*k (token, slot) pairs by expert, so that each expert's inputs are contiguous. */
static void sort_by_expert(pass *p, int64_t n)
{
    const model_config *c = &p->m->config;
    int64_t E = c->n_experts, pairs = n * c->n_experts_used;
    int32_t *first = p->expert_first;

    memset(first, 0, (size_t)(E + 1) * sizeof *first);
    for (int64_t i = 0; i < pairs; i++) first[p->expert_ids[i] + 1]++;
    for (int64_t e = 0; e < E; e++) first[e + 1] += first[e];
    for (int64_t i = 0; i < pairs; i++) {
        p->expert_rows[i] = first[p->expert_ids[i]]++;
        p->expert_token[p->expert_rows[i]] = (int32_t)(i / c->n_experts_used);
    }
    for (int64_t e = E; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
}

/* Rows of gate and up: `routed` of the experts, then the shared expert's (or dense), whose width
 * may differ. */
typedef struct row_loop {
    pass *p;
    int64_t routed, width, shared_width;
} row_loop;

static int64_t row_at(const row_loop *l, int64_t r)
{
    if (r <= l->routed) return r * l->width;
    return l->routed * l->width + (r - l->routed) * l->shared_width;
}

static void gather_inputs(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    pass *p = ctx;
    int64_t H = p->m->config.hidden_size, k = p->m->config.n_experts_used;
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < k; j++)
            memcpy(p->xe + p->expert_rows[i * k + j] * H, p->u + i * H, (size_t)H * sizeof(float));
}

static void gate_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const row_loop *l = ctx;
    for (int64_t r = begin; r < end; r++)
        l->p->m->ops->silu_mul(l->p->gate + row_at(l, r), l->p->up + row_at(l, r),
                               r < l->routed ? l->width : l->shared_width);
}

/* y = sum of the chosen experts' outputs, best first, then the shared one's. */
static void combine_outputs(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const row_loop *l = ctx;
    const pass *p = l->p;
    int64_t H = p->m->config.hidden_size, k = p->m->config.n_experts_used;
    for (int64_t i = begin; i < end; i++) {
        float *y = p->y + i * H;
        memset(y, 0, (size_t)H * sizeof *y);
        for (int64_t j = 0; j < k; j++)
            p->m->ops->axpy(p->expert_weights[i * k + j], p->down + p->expert_rows[i * k + j] * H,
                            y, H);
        p->m->ops->axpy(kern_sigmoidf(p->shared[i]), p->down + (l->routed + i) * H, y, H);
    }
}

static void dense_rows(pass *p, const mlp_weights *w, int64_t first, int64_t n)
{
    int64_t H = p->m->config.hidden_size;
    const float *u = p->u + first * H;
    kern_job jobs[] = {pass_job(&w->gate_proj, u, n, p->gate), pass_job(&w->up_proj, u, n, p->up)};
    row_loop l = {p, 0, 0, w->gate_proj.rows};
    pass_linear_jobs(p, PROFILE_GATE_UP, jobs, 2);
    pool_for(p->m->pool, n, 4, gate_rows, &l);
    pass_show(p, TAP_FFN_DOWN, p->gate, n, w->down_proj.cols, NULL);
    pass_linear(p, PROFILE_DOWN, &w->down_proj, p->gate, n, p->y + first * H);
}

static void dense_mix(pass *p, const mlp_weights *w, int64_t n)
{
    int64_t half = n > FFN_ROWS ? n / 2 : 0; /* n is at most twice FFN_ROWS */
    if (half) dense_rows(p, w, 0, half);
    dense_rows(p, w, half, n - half);
}

/* A tap looks at rows sorted by expert, f32 products read them; rows of 8 bits are picked, and of a
 * single row there are no copies. */
static int wants_sorted(const pass *p, const layer_weights *w, int64_t n)
{
    int takes = p->kern_rows != NULL;
    if (p->tap || n == 1) return p->tap != NULL;
    for (int64_t e = 0; takes && e < p->m->config.n_experts; e++)
        takes =
            kern_takes_int8(&w->experts[e].gate_proj) && kern_takes_int8(&w->experts[e].up_proj);
    return !takes;
}

/* Gate and up of the chosen experts, then of the shared one, whose rows follow theirs. */
static void gate_up(pass *p, const layer_weights *w, int64_t n, int is_sorted)
{
    const model_config *c = &p->m->config;
    int64_t H = c->hidden_size, I = c->moe_intermediate_size, n_jobs = 0;
    for (int64_t e = 0; e < c->n_experts; e++) {
        int64_t first = p->expert_first[e], count = p->expert_first[e + 1] - first;
        const num_matrix *matrix[] = {&w->experts[e].gate_proj, &w->experts[e].up_proj};
        float *y[] = {p->gate + first * I, p->up + first * I};
        for (int i = 0; count && i < 2; i++) {
            kern_job *job = &p->jobs[n_jobs++];
            *job = pass_job(matrix[i], is_sorted ? p->xe + first * H : p->u, count, y[i]);
            if (is_sorted || n == 1) continue;
            job->pick = p->expert_token + first;
            job->n_from = n;
        }
    }
    int64_t shared = n * c->n_experts_used * I;
    p->jobs[n_jobs++] = pass_job(&w->mlp.gate_proj, p->u, n, p->gate + shared);
    p->jobs[n_jobs++] = pass_job(&w->mlp.up_proj, p->u, n, p->up + shared);
    pass_linear_jobs(p, PROFILE_GATE_UP, p->jobs, n_jobs);
}

static void moe_mix(pass *p, const layer_weights *w, int64_t n)
{
    const model_config *c = &p->m->config;
    int64_t H = c->hidden_size, I = c->moe_intermediate_size, Is = c->shared_intermediate_size;
    int64_t routed = n * c->n_experts_used, n_jobs = 0;
    int is_sorted = wants_sorted(p, w, n);
    kern_job route[] = {pass_job(&w->router, p->u, n, p->router),
                        pass_job(&w->shared_gate, p->u, n, p->shared)};

    pass_linear_jobs(p, PROFILE_ROUTER, route, 2);
    pool_for(p->m->pool, n, 4, choose_loop, p);
    if (pool_is_cut(p->m->pool)) return; /* nobody has chosen */
    sort_by_expert(p, n);
    if (is_sorted) pool_for(p->m->pool, n, 4, gather_inputs, p);
    pass_lap(p, PROFILE_DISPATCH, 0);
    pass_show(p, TAP_EXPERT_IN, p->xe, routed, H, p->expert_first);

    gate_up(p, w, n, is_sorted);
    row_loop l = {p, routed, I, Is};
    pool_for(p->m->pool, routed + n, 16, gate_rows, &l);
    const float *shared = p->gate + routed * I;
    pass_show(p, TAP_EXPERT_DOWN, p->gate, routed, I, p->expert_first);
    pass_show(p, TAP_FFN_DOWN, shared, n, Is, NULL);

    for (int64_t e = 0; e < c->n_experts; e++) {
        int64_t first = p->expert_first[e], count = p->expert_first[e + 1] - first;
        if (!count) continue;
        p->jobs[n_jobs++] =
            pass_job(&w->experts[e].down_proj, p->gate + first * I, count, p->down + first * H);
    }
    p->jobs[n_jobs++] = pass_job(&w->mlp.down_proj, shared, n, p->down + routed * H);
    pass_linear_jobs(p, PROFILE_DOWN, p->jobs, n_jobs);
    pool_for(p->m->pool, n, 4, combine_outputs, &l);
    pass_lap(p, PROFILE_COMBINE, 0);
}

void ffn_mix(pass *p, const layer_weights *w, int64_t n)
{
    if (p->m->config.is_moe)
        moe_mix(p, w, n);
    else
        dense_mix(p, &w->mlp, n);
}
