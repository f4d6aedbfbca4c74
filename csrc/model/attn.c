/* attn: gated attention with grouped queries and partial rotary positions (transformers'
 * Qwen3_5Attention).
 *
 *   q, gate = W_q u (per head: D query rows, then D gate rows);  k = W_k u;  v = W_v u
 *   q, k: RMS norm per head, then the first rotary_dim dims rotate by position, pairs (j, j+half)
 *   o = softmax(q k^T / sqrt(D)) v, causal;  y = W_o (o sigmoid(gate)) */
#include "model/pass.h"

#include <math.h>
#include <string.h>

/* ---- rotary positions ----------------------------------------------------------------------- */

void rope_prepare(pass *p, int64_t i, int64_t pos)
{
    const model_config *c = &p->m->config;
    int64_t half = c->rotary_dim / 2;
    for (int64_t j = 0; j < half; j++) {
        double angle = (double)pos * (double)c->inv_freq[j];
        p->cos[i * half + j] = (float)cos(angle) * c->rope_scale;
        p->sin[i * half + j] = (float)sin(angle) * c->rope_scale;
    }
}

static void rotate(float *x, const float *cosines, const float *sines, int64_t half)
{
    for (int64_t j = 0; j < half; j++) {
        float a = x[j], b = x[j + half];
        x[j] = a * cosines[j] - b * sines[j];
        x[j + half] = b * cosines[j] + a * sines[j];
    }
}

/* ---- the mixer ------------------------------------------------------------------------------ */

typedef struct attn_loop {
    pass *p;
    const attn_weights *w;
    int slot;
} attn_loop;

/* The session and position of row i. */
static ses *row_place(const pass *p, int64_t i, int64_t *pos)
{
    const span *sp = p->row_span[i];
    *pos = sp->pos + (i - sp->first);
    return sp->s;
}

/* Norms and rotation of tokens [begin, end); their keys and values go into the cache. */
static void place_tokens(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const attn_loop *l = ctx;
    const pass *p = l->p;
    const model_config *c = &p->m->config;
    const kern_ops *ops = p->m->ops;
    int64_t D = c->head_dim, half = c->rotary_dim / 2, width = c->n_kv_heads * D, pos;

    for (int64_t i = begin; i < end; i++) {
        const float *cosines = p->cos + i * half, *sines = p->sin + i * half;
        for (int64_t h = 0; h < c->n_heads; h++) {
            float *q = p->qg + (i * c->n_heads + h) * 2 * D;
            ops->rms_norm(q, l->w->q_norm, D, c->rms_eps, q);
            rotate(q, cosines, sines, half);
        }
        for (int64_t h = 0; h < c->n_kv_heads; h++) {
            float *k = p->k + i * width + h * D;
            ops->rms_norm(k, l->w->k_norm, D, c->rms_eps, k);
            rotate(k, cosines, sines, half);
        }
        ses *s = row_place(p, i, &pos);
        kv_write(s, l->slot, pos, p->k + i * width, p->v + i * width);
    }
}

/* Items are (token, key/value head) pairs: each cached row is read once for the whole group of
 * query heads that share it. */
static void attend(void *ctx, int64_t begin, int64_t end, int worker)
{
    const attn_loop *l = ctx;
    const pass *b = l->p;
    const model_config *c = &b->m->config;
    const kern_ops *ops = b->m->ops;
    int64_t D = c->head_dim, group = c->n_heads / c->n_kv_heads, ld, n;
    float *scores = b->scores + worker * group * b->n_scores;
    float *tmp = b->kv_rows + worker * KERN_ROWS * D;
    float scale = 1 / sqrtf((float)D);

    for (int64_t item = begin; item < end; item++) {
        int64_t i = item / c->n_kv_heads, first = (item % c->n_kv_heads) * group;
        int h = (int)(item % c->n_kv_heads);
        const ses *s = row_place(b, i, &n);
        n++; /* positions that row i sees */

        int64_t ld_scores = (n + 31) / 16 * 16;
        const float *q = b->qg + (i * c->n_heads + first) * 2 * D;
        float *out = b->heads + (i * c->n_heads + first) * D;

        for (int64_t p = 0; p < n; p += KERN_ROWS) {
            int rows = n - p < KERN_ROWS ? (int)(n - p) : KERN_ROWS;
            const float *keys = kv_head_rows(s, l->slot, KV_KEY, p, rows, h, tmp, &ld);
            ops->dots(keys, ld, rows, q, 2 * D, group, D, scores + p, ld_scores);
        }
        for (int64_t g = 0; g < group; g++) {
            float *row = scores + g * ld_scores;
            for (int64_t p = 0; p < n; p++) row[p] *= scale;
            ops->softmax(row, n);
        }
        memset(out, 0, (size_t)(group * D) * sizeof *out);
        for (int64_t p = 0; p < n; p += KERN_ROWS) {
            int rows = n - p < KERN_ROWS ? (int)(n - p) : KERN_ROWS;
            const float *values = kv_head_rows(s, l->slot, KV_VALUE, p, rows, h, tmp, &ld);
            for (int64_t g = 0; g < group; g++)
                ops->axpy_rows(scores + g * ld_scores + p, values, ld, rows, out + g * D, D);
        }
        for (int64_t g = 0; g < group; g++) ops->sigmoid_mul(out + g * D, q + g * 2 * D + D, D);
    }
}

void attn_mix(pass *p, const attn_weights *w, int slot, int64_t n)
{
    const model_config *c = &p->m->config;
    int64_t H = c->hidden_size;
    attn_loop l = {p, w, slot};
    kern_job jobs[] = {
        {&w->q_proj, p->u, p->qg, H, n, w->q_proj.rows},
        {&w->k_proj, p->u, p->k, H, n, w->k_proj.rows},
        {&w->v_proj, p->u, p->v, H, n, w->v_proj.rows},
    };
    pass_linear_jobs(p, PROFILE_QKV_PROJ, jobs, 3);
    pool_for(p->m->pool, n, 8, place_tokens, &l);
    pool_for(p->m->pool, n * c->n_kv_heads, 1, attend, &l);
    pass_lap(p, PROFILE_ATTEND, p->kv_bytes);
    pass_show(p, TAP_MIXER_OUT, p->heads, n, w->o_proj.cols, NULL);
    pass_linear(p, PROFILE_O_PROJ, &w->o_proj, p->heads, n, p->y);
}
