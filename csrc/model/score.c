/* score: what the model makes of tokens that are given. */
#include "model/pass.h"

#include <string.h>

typedef struct score_loop {
    pass *p;
    const int32_t *targets; /* [n] */
    const int64_t *rows;    /* which of them each scored row is */
    float *nll;
} score_loop;

static void score_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const score_loop *l = ctx;
    int64_t V = l->p->m->config.vocab_size;
    for (int64_t i = begin; i < end; i++) {
        float *logits = l->p->scored + i * V, target = logits[l->targets[l->rows[i]]];
        l->nll[l->rows[i]] = l->p->m->ops->softmax(logits, V) - target;
    }
}

void pass_score(pass *p, const float *x, int64_t n, const int32_t *targets, float *nll)
{
    int64_t H = p->m->config.hidden_size, rows[SES_SCORE_ROWS];
    score_loop l = {p, targets, rows, nll};
    for (int64_t i = 0, count = 0; i < n; i++) {
        nll[i] = 0;
        if (targets[i] >= 0) {
            memcpy(p->y + count * H, x + i * H, (size_t)H * sizeof(float));
            rows[count++] = i;
        }
        if (count == SES_SCORE_ROWS || (i == n - 1 && count)) {
            pass_linear(p, PROFILE_LM_HEAD, &p->m->weights.lm_head, p->y, count, p->scored);
            pool_for(p->m->pool, count, 1, score_rows, &l);
            count = 0;
        }
    }
}

/* ---- texts ---------------------------------------------------------------------------------- */

typedef struct text_loop {
    const pass *p;
    const ses_score *score;
    const int64_t *at; /* of each row of p->scored: the token of the text that it predicts */
} text_loop;

/* The n largest of logits [V] into ids and values, best first, equal ones by index; -1 where there
 * are no more. */
static void take_top(const float *logits, int64_t V, int n, int32_t *ids, float *values)
{
    int found = 0;
    for (int64_t i = 0; n && i < V; i++) {
        if (found == n ? !(logits[i] > values[n - 1]) : logits[i] != logits[i]) continue;
        int at = found < n ? found++ : n - 1;
        for (; at > 0 && logits[i] > values[at - 1]; at--) {
            ids[at] = ids[at - 1];
            values[at] = values[at - 1];
        }
        ids[at] = (int32_t)i;
        values[at] = logits[i];
    }
    for (; found < n; found++) ids[found] = -1;
}

/* Of one token among all, equal ones by index: 1 is the likeliest. */
static int32_t rank_of(const float *logits, int64_t V, int32_t id)
{
    int32_t n = 1;
    for (int64_t i = 0; i < id; i++) n += logits[i] >= logits[id];
    for (int64_t i = id + 1; i < V; i++) n += logits[i] > logits[id];
    return n;
}

static void read_logits(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const text_loop *l = ctx;
    const ses_score *score = l->score;
    int64_t V = l->p->m->config.vocab_size;
    for (int64_t i = begin; i < end; i++) {
        int64_t at = l->at[i];
        int32_t *top_ids = score->top_ids + at * score->n_top;
        float *top = score->top_logprobs + at * score->n_top, *logits = l->p->scored + i * V;
        take_top(logits, V, score->n_top, top_ids, top);
        score->ranks[at] = rank_of(logits, V, score->ids[at]);
        float own = logits[score->ids[at]], sum = l->p->m->ops->softmax(logits, V);
        score->logprobs[at] = own - sum;
        for (int k = 0; k < score->n_top; k++) top[k] -= sum;
    }
}

void pass_score_text(pass *p, const span *sp, const ses_score *score)
{
    int64_t H = p->m->config.hidden_size, at[SES_SCORE_ROWS];
    text_loop l = {p, score, at};
    for (int64_t i = 0, count = 0; score->logprobs && i < sp->n; i++) {
        if (sp->pos + i + 1 < score->n) {
            memcpy(p->y + count * H, p->u + (sp->first + i) * H, (size_t)H * sizeof *p->y);
            at[count++] = sp->pos + i + 1;
        }
        if (count == SES_SCORE_ROWS || (i == sp->n - 1 && count)) {
            pass_linear(p, PROFILE_LM_HEAD, &p->m->weights.lm_head, p->y, count, p->scored);
            pool_for(p->m->pool, count, 1, read_logits, &l);
            count = 0;
        }
    }
}

void pass_sum(const pass *p, const span *sp, double *sums)
{
    int64_t H = p->m->config.hidden_size;
    for (int64_t i = 0; i < sp->n; i++)
        for (int64_t k = 0; k < H; k++) sums[k] += (double)p->u[(sp->first + i) * H + k];
}
