/* pass: what layers and their parts do to every row of a batch. */
#include "model/pass.h"

void pass_linear(ses *s, const num_matrix *w, const float *x, int64_t n, float *y)
{
    kern_linear(s->m->pool, s->m->ops, w, x, w->cols, n, y, w->rows, s->t.kern);
}

typedef struct norm_loop {
    const ses *s;
    const float *x, *weight;
    float *out;
} norm_loop;

static void norm_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const norm_loop *l = ctx;
    const model_config *c = &l->s->m->config;
    int64_t H = c->hidden_size;
    for (int64_t t = begin; t < end; t++)
        l->s->m->ops->rms_norm(l->x + t * H, l->weight, H, c->rms_eps, l->out + t * H);
}

/* out[t] = RMSNorm(x[t]) for n rows of width H. */
void pass_norm(ses *s, const float *x, const float *weight, int64_t n, float *out)
{
    norm_loop l = {s, x, weight, out};
    pool_for(s->m->pool, n, 8, norm_rows, &l);
}
