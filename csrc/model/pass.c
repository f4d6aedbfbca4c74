/* pass: the workspace of a batch, and what layers and their parts do to every row of it. */
#include "model/pass.h"

#include "base/mem.h"

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

static int64_t one_form(const pass *p, int64_t cols)
{
    return max64(kern_int8_bytes(cols), kern_bf16_bytes(p->m->ops, cols));
}

static int64_t both_forms(const pass *p, int64_t cols)
{
    return kern_int8_bytes(cols) + kern_bf16_bytes(p->m->ops, cols);
}

/* The most rounded rows that one parallel region reads, times their width: those of one matrix, in
 * 8 bits or in bf16; those that several read, as wide as the residual stream, in both forms where
 * the matrices differ; of a MoE a batch's and, k times as many, those that experts read. */
static int64_t kern_rows_bytes(const pass *p)
{
    const model_config *c = &p->m->config;
    int64_t H = c->hidden_size, alone = max64(one_form(p, p->kern_cols), both_forms(p, H));
    int64_t k = c->n_experts_used, gate_up = (k + 1) * both_forms(p, H);
    int64_t down =
        k * one_form(p, c->moe_intermediate_size) + one_form(p, c->shared_intermediate_size);
    return SES_BATCH * max64(alone, c->is_moe ? max64(gate_up, down) : 0);
}

static void lay_out_gdn(pass *p, layout *l)
{
    const model_config *c = &p->m->config;
    int64_t n = SES_BATCH, C = config_conv_width(c), Nv = c->lin_v_heads;
    size_t f = sizeof(float);

    p->conv_in = take(l, n * C, f);
    p->conv_out = take(l, n * C, f);
    p->z = take(l, n * config_value_width(c), f);
    p->b = take(l, n * Nv, f);
    p->a = take(l, n * Nv, f);
}

static void lay_out_attn(pass *p, layout *l)
{
    const model_config *c = &p->m->config;
    int64_t n = SES_BATCH, D = c->head_dim, kv_width = (int64_t)c->n_kv_heads * D;
    size_t f = sizeof(float);

    p->qg = take(l, n * c->n_heads * 2 * D, f);
    p->q = take(l, n * c->n_heads * D, f);
    p->k = take(l, n * kv_width, f);
    p->v = take(l, n * kv_width, f);
    p->heads = take(l, n * c->n_heads * D, f);
    p->query_codes = p->m->int8 ? take(l, n * c->n_heads, (size_t)kern_attn_query_bytes(D)) : NULL;
}

static void lay_out_ffn(pass *p, layout *l)
{
    const model_config *c = &p->m->config;
    int64_t n = SES_BATCH, H = c->hidden_size, E = c->n_experts, pairs = n * c->n_experts_used;
    int64_t ffn = c->is_moe ? pairs * c->moe_intermediate_size + n * c->shared_intermediate_size
                            : FFN_ROWS * (int64_t)c->intermediate_size;
    size_t f = sizeof(float);

    p->router = take(l, n * E, f);
    p->expert_ids = take(l, pairs, sizeof *p->expert_ids);
    p->expert_weights = take(l, pairs, f);
    p->expert_rows = take(l, pairs, sizeof *p->expert_rows);
    p->expert_token = take(l, pairs, sizeof *p->expert_token);
    p->expert_first = take(l, E + 1, sizeof *p->expert_first);
    p->gate = take(l, ffn, f);
    p->up = take(l, ffn, f);
    p->down = take(l, c->is_moe ? (pairs + n) * H : 0, f);
    p->shared = take(l, n, f);
    p->jobs = take(l, 2 * (E + 1), sizeof *p->jobs);
}

/* What a part of a layer computes in is free for the next part. */
static void lay_out_parts(pass *p, layout *l)
{
    static void (*const parts[])(pass *, layout *) = {lay_out_gdn, lay_out_attn, lay_out_ffn};
    size_t begin = l->n_bytes, end = begin;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        l->n_bytes = begin;
        parts[i](p, l);
        if (l->n_bytes > end) end = l->n_bytes;
    }
    l->n_bytes = end;
}

static void lay_out(pass *p, layout *l)
{
    const model_config *c = &p->m->config;
    int64_t n = SES_BATCH, H = c->hidden_size, workers = pool_n_threads(p->m->pool);
    size_t f = sizeof(float);

    p->row_span = take(l, n, sizeof(span *));
    p->x = take(l, n * H, f);
    p->u = take(l, n * H, f);
    p->y = take(l, n * H, f);
    p->cos = take(l, n * c->rotary_dim / 2, f);
    p->sin = take(l, n * c->rotary_dim / 2, f);
    p->mtp_in = take(l, p->m->weights.mtp.present ? n * 2 * H : 0, f);
    p->kern = take(l, workers, (size_t)kern_scratch_bytes(p->kern_cols));
    p->kern_rows = p->m->int8 ? take(l, 1, (size_t)kern_rows_bytes(p)) : NULL;
    p->attn_work = take(l, workers, (size_t)attn_work_bytes(p->m));
    lay_out_parts(p, l);
}

static size_t xe_bytes(const pass *p)
{
    const model_config *c = &p->m->config;
    return SES_BATCH * (size_t)c->n_experts_used * (size_t)c->hidden_size * sizeof(float);
}

static size_t found_bytes(const pass *p)
{
    const model_config *c = &p->m->config;
    return (size_t)(c->n_heads / c->n_kv_heads) * (size_t)p->n_found * (size_t)(c->head_dim + 2) *
           sizeof(float);
}

static size_t scored_bytes(const pass *p)
{
    return SES_SCORE_ROWS * (size_t)p->m->config.vocab_size * sizeof(float);
}

static err_code open_into(pass *p, err_info *e)
{
    layout l = {0};
    lay_out(p, &l);
    if (l.overflow) return err_set(e, ERR_MEMORY, "scratch does not fit in memory");
    p->arena_bytes = l.n_bytes;
    if (!(p->arena = mem_pages(p->arena_bytes, e))) return e->code;
    l = (layout){.base = p->arena};
    lay_out(p, &l);
    if (!(p->found = mem_pages(found_bytes(p), e))) return e->code;
    if (!(p->scored = mem_pages(scored_bytes(p), e))) return e->code;
    if (p->m->config.is_moe && !(p->xe = mem_pages(xe_bytes(p), e))) return e->code;
    return ERR_NONE;
}

pass *pass_open(model *m, err_info *e)
{
    pass *p = mem_array(1, sizeof *p, e);
    if (!p) return NULL;
    p->m = m;
    p->n_found = attn_n_found(&m->config);
    p->kern_cols = widest_matrix(&m->config);
    if (open_into(p, e)) {
        pass_close(p);
        return NULL;
    }
    return p;
}

void pass_close(pass *p)
{
    if (!p) return;
    mem_pages_free(p->found, found_bytes(p));
    mem_pages_free(p->scored, scored_bytes(p));
    mem_pages_free(p->xe, xe_bytes(p));
    mem_pages_free(p->arena, p->arena_bytes);
    mem_free(p);
}

/* The first of the batch's sessions that is profiled counts it. */
static void begin_profile(pass *p)
{
    int64_t n = 0;
    for (int i = 0; i < p->n_spans; i++) {
        ses *s = p->spans[i].s;
        if (!p->profile && s->is_profiled) p->profile = &s->profile;
        n += p->spans[i].n;
    }
    if (p->profile) profile_begin(p->profile, n);
}

int64_t pass_begin(pass *p, const span *spans, int n_spans)
{
    int64_t n = 0;
    p->spans = spans;
    p->n_spans = n_spans;
    begin_profile(p);
    p->kv_bytes = 0;
    for (int i = 0; i < n_spans; i++) {
        p->kv_bytes += 2 * kv_row_bytes(p->m, spans[i].s->codec) * (spans[i].pos + spans[i].n);
        kv_own(spans[i].s, spans[i].pos, spans[i].n);
        for (int64_t j = 0; j < spans[i].n; j++, n++) {
            p->row_span[n] = &spans[i];
            rope_prepare(p, n, spans[i].pos + j);
        }
    }
    return n;
}

void pass_end(pass *p)
{
    pass_lap(p, PROFILE_OTHER, 0);
    p->profile = NULL;
}

void pass_linear(pass *p, profile_op op, const num_matrix *w, const float *x, int64_t n, float *y)
{
    kern_job job = pass_job(w, x, n, y);
    pass_linear_jobs(p, op, &job, 1);
}

void pass_linear_jobs(pass *p, profile_op op, kern_job *jobs, int64_t n_jobs)
{
    int64_t bytes = 0;
    if (p->kern_rows)
        kern_linear_jobs_fast(p->m->pool, p->m->ops, jobs, n_jobs, p->kern_cols, p->kern,
                              p->kern_rows);
    else
        kern_linear_jobs(p->m->pool, p->m->ops, jobs, n_jobs, p->kern_cols, p->kern);
    for (int64_t i = 0; p->profile && i < n_jobs; i++) bytes += num_matrix_bytes(jobs[i].w);
    pass_lap(p, op, bytes);
}

typedef struct norm_loop {
    const pass *p;
    const float *x, *weight;
    float *out;
} norm_loop;

static void norm_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const norm_loop *l = ctx;
    const model_config *c = &l->p->m->config;
    int64_t H = c->hidden_size;
    for (int64_t t = begin; t < end; t++)
        l->p->m->ops->rms_norm(l->x + t * H, l->weight, H, c->rms_eps, l->out + t * H);
}

void pass_norm(pass *p, const float *x, const float *weight, int64_t n, float *out)
{
    norm_loop l = {p, x, weight, out};
    pool_for(p->m->pool, n, 8, norm_rows, &l);
    pass_lap(p, PROFILE_NORM, 0);
}

static void add_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    pass *p = ctx;
    int64_t H = p->m->config.hidden_size;
    for (int64_t i = begin * H; i < end * H; i++) p->x[i] += p->y[i];
}

void pass_add(pass *p, int64_t n)
{
    pool_for(p->m->pool, n, 8, add_rows, p);
}
