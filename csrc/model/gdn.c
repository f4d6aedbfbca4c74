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
    pass *p;
    const gdn_weights *w;
    int slot;
    int64_t n; /* rows of the batch */
} gdn_loop;

/* The rows that enter the convolution before a session's next token, oldest first: [K-1][C]. */
static float *conv_past(const gdn_loop *l, const span *sp)
{
    const model_config *c = &l->p->m->config;
    return sp->s->conv + (int64_t)l->slot * (c->conv_kernel - 1) * config_conv_width(c);
}

/* After the convolution a head's rows lie together: [head][n][its width]. Rows of all heads would
 * be a power of two apart, and a head's tokens compete for the same few lines of a cache. */
static float *head_rows(const gdn_loop *l, int64_t first_column)
{
    return l->p->conv_out + first_column * l->n;
}

/* The session's last K-1 rows of `width` columns from `at` on, for its next token. */
static void keep_rows(const gdn_loop *l, const span *sp, int64_t at, int64_t width)
{
    const pass *p = l->p;
    int64_t C = config_conv_width(&p->m->config), past = p->m->config.conv_kernel - 1;
    int64_t n_new = sp->n < past ? sp->n : past, n_old = past - n_new;
    float *kept = conv_past(l, sp) + at;
    const float *now = p->conv_in + (sp->first + sp->n - n_new) * C + at;
    for (int64_t j = 0; j < past; j++)
        memcpy(kept + j * C, j < n_old ? kept + (j + n_new) * C : now + (j - n_old) * C,
               (size_t)width * sizeof *kept);
}

/* Convolution, SiLU and norms of one head: `width` columns from `at` on, for all rows. */
static void prepare_head(const gdn_loop *l, int64_t at, int64_t width, float norm_scale)
{
    const pass *p = l->p;
    const model_config *c = &p->m->config;
    const kern_ops *ops = p->m->ops;
    int64_t C = config_conv_width(c), past = c->conv_kernel - 1;

    for (const span *sp = p->spans; sp < p->spans + p->n_spans; sp++) {
        const float *before = conv_past(l, sp) + at, *now = p->conv_in + sp->first * C + at;
        for (int64_t i = 0; i < sp->n; i++) {
            const float *rows[CONFIG_MAX_TAPS];
            for (int64_t j = 0; j <= past; j++)
                rows[j] = i + j < past ? before + (i + j) * C : now + (i + j - past) * C;
            float *out = head_rows(l, at) + (sp->first + i) * width;
            ops->conv_silu(rows, l->w->conv + at * (past + 1), (int)past + 1, width, out);
            if (norm_scale != 0) ops->l2_norm(out, width, 1e-6f, norm_scale, out);
        }
        keep_rows(l, sp, at, width);
    }
}

/* beta and decay of value head h take the places of b and a. */
static void prepare_gates(const gdn_loop *l, int64_t h)
{
    const pass *p = l->p;
    int64_t Nv = p->m->config.lin_v_heads;
    for (int64_t i = h; i < l->n * Nv; i += Nv) {
        p->b[i] = kern_sigmoidf(p->b[i]);
        p->a[i] = kern_expf(l->w->neg_exp_a[h] * kern_softplusf(p->a[i] + l->w->dt_bias[h]));
    }
}

/* Heads [begin, end) of the Nk query, Nk key and Nv value heads. */
static void prepare_heads(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const gdn_loop *l = ctx;
    const model_config *c = &l->p->m->config;
    int64_t Nk = c->lin_k_heads, Dk = c->lin_k_dim, Dv = c->lin_v_dim;
    float query_scale = 1 / sqrtf((float)Dk);

    for (int64_t h = begin; h < end; h++) {
        if (h < 2 * Nk) {
            prepare_head(l, h * Dk, Dk, h < Nk ? query_scale : 1);
        } else {
            prepare_head(l, 2 * Nk * Dk + (h - 2 * Nk) * Dv, Dv, 0);
            prepare_gates(l, h - 2 * Nk);
        }
    }
}

/* The recurrence of items [begin, end), which are (span, value head) pairs, then norm and gate into
 * z. A few tokens at a time, so that they stay in L1 while the rows of S pass by. */
static void run_heads(void *ctx, int64_t begin, int64_t end, int worker)
{
    enum { TOKENS = 32 };
    (void)worker;
    const gdn_loop *l = ctx;
    pass *p = l->p;
    const model_config *c = &p->m->config;
    const kern_ops *ops = p->m->ops;
    int64_t Nk = c->lin_k_heads, Nv = c->lin_v_heads, Dk = c->lin_k_dim, Dv = c->lin_v_dim;

    for (int64_t item = begin; item < end; item++) {
        const span *sp = &p->spans[item / Nv];
        int64_t h = item % Nv, key_head = h / (Nv / Nk), last = sp->first + sp->n;
        float *S = sp->s->S + (l->slot * Nv + h) * Dv * Dk;
        const float *q = head_rows(l, key_head * Dk), *k = head_rows(l, (Nk + key_head) * Dk);
        float *v = head_rows(l, 2 * Nk * Dk + h * Dv); /* its output replaces it */
        for (int64_t i = sp->first; i < last; i += TOKENS) {
            kern_delta d = {.q = q + i * Dk,
                            .k = k + i * Dk,
                            .v = v + i * Dv,
                            .decay = p->a + i * Nv + h,
                            .beta = p->b + i * Nv + h,
                            .n = last - i < TOKENS ? last - i : TOKENS,
                            .ld_qk = Dk,
                            .ld_v = Dv,
                            .ld_gates = Nv};
            ops->delta_rule(S, Dk, Dv, &d);
        }
        for (int64_t i = sp->first; i < last; i++) {
            ops->rms_norm(v + i * Dv, l->w->norm, Dv, c->rms_eps, v + i * Dv);
            ops->silu_mul(p->z + (i * Nv + h) * Dv, v + i * Dv, Dv);
        }
    }
}

void gdn_mix(pass *p, const gdn_weights *w, int slot, int64_t n)
{
    const model_config *c = &p->m->config;
    int64_t Nk = c->lin_k_heads, Nv = c->lin_v_heads, C = config_conv_width(c), f = sizeof(float);
    gdn_loop l = {p, w, slot, n};

    kern_job jobs[] = {
        pass_job(&w->in_proj_qkv, p->u, n, p->conv_in),
        pass_job(&w->in_proj_z, p->u, n, p->z),
        pass_job(&w->in_proj_b, p->u, n, p->b),
        pass_job(&w->in_proj_a, p->u, n, p->a),
    };
    pass_linear_jobs(p, PROFILE_IN_PROJ, jobs, 4);
    pool_for(p->m->pool, 2 * Nk + Nv, 4, prepare_heads, &l);
    pass_lap(p, PROFILE_CONV, 2 * p->n_spans * (c->conv_kernel - 1) * C * f);
    pool_for(p->m->pool, p->n_spans * Nv, 1, run_heads, &l);
    pass_lap(p, PROFILE_DELTA, 2 * p->n_spans * Nv * c->lin_v_dim * c->lin_k_dim * f);
    pass_show(p, TAP_MIXER_OUT, p->z, n, w->out_proj.cols, NULL);
    pass_linear(p, PROFILE_OUT_PROJ, &w->out_proj, p->z, n, p->y);
}
