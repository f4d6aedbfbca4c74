/* gdn: the Gated DeltaNet mixer (Yang et al. 2024, https://arxiv.org/abs/2412.06464, as in
 * transformers' Qwen3_5GatedDeltaNet).
 *
 *   m = W_qkv u;  z = W_z u;  b = W_b u;  a = W_a u
 *   c = silu(conv(m)): q, k, v        q, k: l2 norm per head, q also / sqrt(Dk)
 *   beta = sigmoid(b);  decay = exp(-exp(A_log) softplus(a + dt_bias))
 *   S = decay S;  S += beta (v - S k) k^T;  o = S q               per value head, token by token
 *   y = W_out (norm(o) silu(z))
 * Value head h reads key head h / (Nv/Nk). */
#include "model/pass.h"

#include <math.h>
#include <string.h>

typedef struct gdn_loop {
    ses *s;
    const gdn_weights *w;
    float *S; /* [Nv][Dv][Dk] of this layer */
    int64_t n;
} gdn_loop;

/* Convolution, SiLU and norms for heads [begin, end) of the Nk query, Nk key and Nv value heads. */
static void prepare_heads(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const gdn_loop *l = ctx;
    const model_config *c = &l->s->m->config;
    const kern_ops *ops = l->s->m->ops;
    scratch *t = &l->s->t;
    int64_t Nk = c->lin_k_heads, Dk = c->lin_k_dim, Dv = c->lin_v_dim, C = config_conv_width(c);
    int K = c->conv_kernel;

    for (int64_t h = begin; h < end; h++) {
        int64_t is_value = h >= 2 * Nk, width = is_value ? Dv : Dk;
        int64_t at = is_value ? 2 * Nk * Dk + (h - 2 * Nk) * Dv : h * Dk;
        for (int64_t i = 0; i < l->n; i++) {
            const float *rows[CONFIG_MAX_TAPS];
            for (int j = 0; j < K; j++) rows[j] = t->conv_in + (i + j) * C + at;
            float *out = t->conv_out + i * C + at;
            ops->conv_silu(rows, l->w->conv + at * K, K, width, out);
            if (!is_value) ops->l2_norm(out, Dk, 1e-6f, h < Nk ? 1 / sqrtf((float)Dk) : 1, out);
        }
    }
}

/* The recurrence of value heads [begin, end) over all tokens, then norm and gate into z. */
static void run_heads(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const gdn_loop *l = ctx;
    const model_config *c = &l->s->m->config;
    const kern_ops *ops = l->s->m->ops;
    scratch *t = &l->s->t;
    int64_t Nk = c->lin_k_heads, Nv = c->lin_v_heads, Dk = c->lin_k_dim, Dv = c->lin_v_dim;
    int64_t C = config_conv_width(c);

    for (int64_t h = begin; h < end; h++) {
        int64_t key_head = h / (Nv / Nk);
        for (int64_t i = 0; i < l->n; i++) {
            float *q = t->conv_out + i * C + key_head * Dk, *k = q + Nk * Dk;
            float *v = t->conv_out + i * C + 2 * Nk * Dk + h * Dv; /* its output replaces it */
            float beta = kern_sigmoidf(t->b[i * Nv + h]);
            float decay =
                kern_expf(l->w->neg_exp_a[h] * kern_softplusf(t->a[i * Nv + h] + l->w->dt_bias[h]));
            ops->delta_step(l->S + h * Dv * Dk, q, k, v, Dk, Dv, decay, beta, v);
            ops->rms_norm(v, l->w->norm, Dv, c->rms_eps, v);
            ops->silu_mul(t->z + (i * Nv + h) * Dv, v, Dv);
        }
    }
}

void gdn_mix(ses *s, const gdn_weights *w, int slot, int64_t n)
{
    const model_config *c = &s->m->config;
    scratch *t = &s->t;
    int64_t Nk = c->lin_k_heads, Nv = c->lin_v_heads, C = config_conv_width(c);
    int64_t past = c->conv_kernel - 1;
    float *conv = s->conv + slot * past * C;
    gdn_loop l = {s, w, s->S + slot * Nv * c->lin_v_dim * c->lin_k_dim, n};

    memcpy(t->conv_in, conv, (size_t)(past * C) * sizeof *conv);
    kern_job jobs[] = {
        {&w->in_proj_qkv, t->u, t->conv_in + past * C, c->hidden_size, n, C},
        {&w->in_proj_z, t->u, t->z, c->hidden_size, n, w->in_proj_z.rows},
        {&w->in_proj_b, t->u, t->b, c->hidden_size, n, Nv},
        {&w->in_proj_a, t->u, t->a, c->hidden_size, n, Nv},
    };
    kern_linear_jobs(s->m->pool, s->m->ops, jobs, 4, t->kern_cols, t->kern);
    memcpy(conv, t->conv_in + n * C, (size_t)(past * C) * sizeof *conv);

    pool_for(s->m->pool, 2 * Nk + Nv, 4, prepare_heads, &l);
    pool_for(s->m->pool, Nv, 1, run_heads, &l);
    pass_linear(s, &w->out_proj, t->z, n, t->y);
}
