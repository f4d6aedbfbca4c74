/* Which tensor belongs where. The file is the authority on names, tying and expert layout; the
 * model's shape comes from config.json; whatever is left over afterwards is an error, because a
 * tensor nobody reads usually means that something was understood wrongly. */
#include "model/bind.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"

/* ---- places --------------------------------------------------------------------------------- */

typedef enum width {
    W_ONE,
    W_HIDDEN,
    W_CONV,
    W_VALUE,
    W_V_HEADS,
    W_QUERY_GATE,
    W_QUERY,
    W_KV,
    W_DENSE,
    W_SHARED,
    W_EXPERTS,
    W_EXPERT
} width;

static int64_t width_of(const model_config *c, width w)
{
    switch (w) {
    case W_ONE: return 1;
    case W_HIDDEN: return c->hidden_size;
    case W_CONV: return config_conv_width(c);
    case W_VALUE: return config_value_width(c);
    case W_V_HEADS: return c->lin_v_heads;
    case W_QUERY_GATE: return 2LL * c->n_heads * c->head_dim;
    case W_QUERY: return (int64_t)c->n_heads * c->head_dim;
    case W_KV: return (int64_t)c->n_kv_heads * c->head_dim;
    case W_DENSE: return c->intermediate_size;
    case W_SHARED: return c->shared_intermediate_size;
    case W_EXPERTS: return c->n_experts;
    case W_EXPERT: return c->moe_intermediate_size;
    }
    return 0;
}

/* A matrix of a layer: its name below the layer, where it goes, and its shape. */
typedef struct place {
    const char *name;
    size_t offset; /* of the num_matrix in layer_weights */
    width rows, cols;
} place;

#define AT(member) offsetof(layer_weights, member)
static const place gdn_places[] = {
    {"linear_attn.in_proj_qkv", AT(gdn.in_proj_qkv), W_CONV, W_HIDDEN},
    {"linear_attn.in_proj_z", AT(gdn.in_proj_z), W_VALUE, W_HIDDEN},
    {"linear_attn.in_proj_b", AT(gdn.in_proj_b), W_V_HEADS, W_HIDDEN},
    {"linear_attn.in_proj_a", AT(gdn.in_proj_a), W_V_HEADS, W_HIDDEN},
    {"linear_attn.out_proj", AT(gdn.out_proj), W_HIDDEN, W_VALUE},
    {0},
};
static const place attn_places[] = {
    {"self_attn.q_proj", AT(attn.q_proj), W_QUERY_GATE, W_HIDDEN},
    {"self_attn.k_proj", AT(attn.k_proj), W_KV, W_HIDDEN},
    {"self_attn.v_proj", AT(attn.v_proj), W_KV, W_HIDDEN},
    {"self_attn.o_proj", AT(attn.o_proj), W_HIDDEN, W_QUERY},
    {0},
};
static const place dense_places[] = {
    {"mlp.gate_proj", AT(mlp.gate_proj), W_DENSE, W_HIDDEN},
    {"mlp.up_proj", AT(mlp.up_proj), W_DENSE, W_HIDDEN},
    {"mlp.down_proj", AT(mlp.down_proj), W_HIDDEN, W_DENSE},
    {0},
};
static const place moe_places[] = {
    {"mlp.gate", AT(router), W_EXPERTS, W_HIDDEN},
    {"mlp.shared_expert_gate", AT(shared_gate), W_ONE, W_HIDDEN},
    {"mlp.shared_expert.gate_proj", AT(mlp.gate_proj), W_SHARED, W_HIDDEN},
    {"mlp.shared_expert.up_proj", AT(mlp.up_proj), W_SHARED, W_HIDDEN},
    {"mlp.shared_expert.down_proj", AT(mlp.down_proj), W_HIDDEN, W_SHARED},
    {0},
};
#undef AT
/* Of one expert; offsets count in mlp_weights. */
static const place expert_places[] = {
    {"gate_proj", offsetof(mlp_weights, gate_proj), W_EXPERT, W_HIDDEN},
    {"up_proj", offsetof(mlp_weights, up_proj), W_EXPERT, W_HIDDEN},
    {"down_proj", offsetof(mlp_weights, down_proj), W_HIDDEN, W_EXPERT},
    {0},
};

static num_matrix *at_place(const void *base, const place *p)
{
    return (num_matrix *)((uintptr_t)base + p->offset);
}

static const place *mixer_places(int is_full)
{
    return is_full ? attn_places : gdn_places;
}

static const place *ffn_places(const model_config *c)
{
    return c->is_moe ? moe_places : dense_places;
}

/* ---- one layer ------------------------------------------------------------------------------ */

typedef struct layer_job {
    binder *b;
    const model_config *c;
    const char *prefix; /* "model.layers.3." */
    float norm_add;     /* 1 where norms are stored zero-centred */
    int conv_last;      /* 1: conv1d is [C, 1, K] (Hugging Face), 0: [C, K, 1] (MLX) */
} layer_job;

static err_code bind_places(const layer_job *job, const place *p, void *base)
{
    char name[BIND_NAME];
    for (; p->name; p++) {
        bind_join(name, job->prefix, p->name);
        if (bind_matrix(job->b, name, width_of(job->c, p->rows), width_of(job->c, p->cols),
                        at_place(base, p)))
            return job->b->e->code;
    }
    return ERR_NONE;
}

static err_code layer_vector(const layer_job *job, const char *suffix, int64_t n, float add,
                             const float **out)
{
    char name[BIND_NAME];
    bind_join(name, job->prefix, suffix);
    return bind_vector(job->b, name, 1, &n, add, out);
}

static err_code bind_conv(const layer_job *job, const float **out)
{
    char name[BIND_NAME];
    bind_join(name, job->prefix, "linear_attn.conv1d.weight");
    int64_t n = config_conv_width(job->c), k = job->c->conv_kernel;
    const int64_t hf[3] = {n, 1, k}, mlx[3] = {n, k, 1};
    return bind_vector(job->b, name, 3, job->conv_last ? hf : mlx, 0, out);
}

static err_code bind_gdn(const layer_job *job, layer_weights *l)
{
    const model_config *c = job->c;
    gdn_weights *g = &l->gdn;
    const float *a_log;
    if (bind_places(job, gdn_places, l) || bind_conv(job, &g->conv) ||
        layer_vector(job, "linear_attn.A_log", c->lin_v_heads, 0, &a_log) ||
        layer_vector(job, "linear_attn.dt_bias", c->lin_v_heads, 0, &g->dt_bias) ||
        layer_vector(job, "linear_attn.norm.weight", c->lin_v_dim, 0, &g->norm))
        return job->b->e->code;
    float *neg = bind_alloc(job->b, (size_t)c->lin_v_heads, sizeof *neg);
    if (!neg) return ERR_MEMORY;
    for (int h = 0; h < c->lin_v_heads; h++) neg[h] = (float)-exp(a_log[h]);
    g->neg_exp_a = neg;
    return ERR_NONE;
}

static err_code bind_attn(const layer_job *job, layer_weights *l)
{
    int64_t d = job->c->head_dim;
    if (bind_places(job, attn_places, l) ||
        layer_vector(job, "self_attn.q_norm.weight", d, job->norm_add, &l->attn.q_norm) ||
        layer_vector(job, "self_attn.k_norm.weight", d, job->norm_add, &l->attn.k_norm))
        return job->b->e->code;
    /* scales of quantized KV caches, which moonlet chooses for itself */
    bind_find(job->b, job->prefix, "self_attn.k_scale");
    bind_find(job->b, job->prefix, "self_attn.v_scale");
    return ERR_NONE;
}

/* ---- experts -------------------------------------------------------------------------------- */

/* transformers fuses gate and up of all experts: [E, 2I, H] and [E, H, I], gate rows first. */
static err_code bind_fused_experts(const layer_job *job, mlp_weights *experts)
{
    char name[BIND_NAME];
    int64_t E = job->c->n_experts, H = job->c->hidden_size, I = job->c->moe_intermediate_size;
    bind_stack gate_up, down;
    bind_join(name, job->prefix, "mlp.experts.gate_up_proj");
    if (bind_fused(job->b, name, E, 2 * I, H, &gate_up)) return job->b->e->code;
    bind_join(name, job->prefix, "mlp.experts.down_proj");
    if (bind_fused(job->b, name, E, H, I, &down)) return job->b->e->code;
    if (gate_up.all.tile_rows > 1 && I % gate_up.all.tile_rows)
        return err_set(job->b->e, ERR_UNSUPPORTED,
                       "%smlp.experts.gate_up_proj: tiles of %lld rows "
                       "straddle gate and up",
                       job->prefix, (long long)gate_up.all.tile_rows);
    for (int64_t i = 0; i < E; i++) {
        experts[i].gate_proj = bind_slice(&gate_up, i, 2 * I, 0, I);
        experts[i].up_proj = bind_slice(&gate_up, i, 2 * I, I, I);
        experts[i].down_proj = bind_slice(&down, i, H, 0, H);
    }
    return ERR_NONE;
}

/* mlx-lm stacks each projection. */
static err_code bind_switch_experts(const layer_job *job, mlp_weights *experts)
{
    char name[BIND_NAME];
    for (const place *p = expert_places; p->name; p++) {
        int64_t rows = width_of(job->c, p->rows), cols = width_of(job->c, p->cols);
        bind_stack s;
        bind_join(name, job->prefix, "mlp.switch_mlp.");
        bind_join(name, name, p->name);
        if (bind_module(job->b, name, job->c->n_experts, rows, cols, &s)) return job->b->e->code;
        for (int64_t i = 0; i < job->c->n_experts; i++)
            *at_place(&experts[i], p) = bind_slice(&s, i, rows, 0, rows);
    }
    return ERR_NONE;
}

static err_code bind_single_experts(const layer_job *job, mlp_weights *experts)
{
    char prefix[BIND_NAME], local[64];
    layer_job one = *job;
    one.prefix = prefix;
    for (int i = 0; i < job->c->n_experts; i++) {
        snprintf(local, sizeof local, "mlp.experts.%d.", i);
        bind_join(prefix, job->prefix, local);
        if (bind_places(&one, expert_places, &experts[i])) return job->b->e->code;
    }
    return ERR_NONE;
}

static int has_module(const binder *b, const char *prefix, const char *name)
{
    char module[BIND_NAME];
    bind_join(module, prefix, name);
    return bind_has(b, module, ".weight") || bind_has(b, module, ".weight_packed");
}

static err_code bind_experts(const layer_job *job, layer_weights *l)
{
    binder *b = job->b;
    /* two names each, so that a layout with one tensor missing is still recognised */
    int fused = bind_has(b, job->prefix, "mlp.experts.gate_up_proj") ||
                bind_has(b, job->prefix, "mlp.experts.down_proj");
    int stacked = has_module(b, job->prefix, "mlp.switch_mlp.gate_proj") ||
                  has_module(b, job->prefix, "mlp.switch_mlp.up_proj");
    int single = has_module(b, job->prefix, "mlp.experts.0.gate_proj") ||
                 has_module(b, job->prefix, "mlp.experts.0.up_proj");
    if (fused + stacked + single > 1)
        return err_set(b->e, ERR_FORMAT, "%smlp: experts are stored twice, as%s%s%s", job->prefix,
                       fused ? " experts.gate_up_proj" : "", stacked ? " switch_mlp.gate_proj" : "",
                       single ? " experts.0.gate_proj" : "");
    if (fused + stacked + single == 0)
        return bind_missing(b, job->prefix, "mlp.experts.gate_up_proj");
    mlp_weights *experts = bind_alloc(b, (size_t)job->c->n_experts, sizeof *experts);
    if (!experts) return ERR_MEMORY;
    l->experts = experts;
    return fused     ? bind_fused_experts(job, experts)
           : stacked ? bind_switch_experts(job, experts)
                     : bind_single_experts(job, experts);
}

static err_code bind_layer(const layer_job *job, int is_full, layer_weights *l)
{
    int64_t H = job->c->hidden_size;
    if (layer_vector(job, "input_layernorm.weight", H, job->norm_add, &l->input_norm) ||
        layer_vector(job, "post_attention_layernorm.weight", H, job->norm_add, &l->post_norm) ||
        (is_full ? bind_attn(job, l) : bind_gdn(job, l)) ||
        bind_places(job, ffn_places(job->c), l) || (job->c->is_moe && bind_experts(job, l)))
        return job->b->e->code;
    return ERR_NONE;
}

/* ---- the file's conventions ----------------------------------------------------------------- */

static const char *const stack_prefixes[] = {"model.language_model.", "language_model.model.",
                                             "model.", ""};
static const char *const head_names[] = {"lm_head", "language_model.lm_head", "model.lm_head",
                                         "model.language_model.lm_head"};
static const char *const mtp_prefixes[] = {"mtp.", "language_model.mtp.", "model.mtp.",
                                           "model.language_model.mtp."};
static const char *const vision_prefixes[] = {"model.visual.", "visual.", "vision_tower.",
                                              "model.vision_tower.",
                                              "language_model.vision_tower."};
enum { N_PREFIXES = sizeof stack_prefixes / sizeof *stack_prefixes };

static err_code find_prefix(binder *b)
{
    for (int i = 0; i < N_PREFIXES; i++)
        if (has_module(b, stack_prefixes[i], "embed_tokens") ||
            bind_has(b, stack_prefixes[i], "norm.weight")) {
            snprintf(b->prefix, sizeof b->prefix, "%s", stack_prefixes[i]);
            return ERR_NONE;
        }
    return bind_missing(b, "model.language_model.embed_tokens", ".weight");
}

/* mlx-lm's own rule (models/qwen3_5.py, sanitize): a conv1d whose last dimension is not 1 is the
 * Hugging Face layout, and only there norms are zero-centred. Models without a linear layer fall
 * back on who wrote the file. */
static int is_hf_layout(const binder *b, const model_config *c)
{
    char name[BIND_NAME], local[64];
    for (int i = 0; i < c->n_layers; i++) {
        if (c->is_full[i]) continue;
        snprintf(local, sizeof local, "layers.%d.linear_attn.conv1d.weight", i);
        bind_join(name, b->prefix, local);
        const st_tensor *t = st_find(b->set, name);
        if (t) return t->n_dims == 0 || t->shape[t->n_dims - 1] != 1;
    }
    const char *writer = st_metadata(b->set, "format");
    return !writer || strcmp(writer, "mlx") != 0;
}

/* ---- parts ---------------------------------------------------------------------------------- */

static err_code bind_ends(binder *b, const layer_job *job, weights *w)
{
    int64_t V = job->c->vocab_size, H = job->c->hidden_size;
    char name[BIND_NAME];
    bind_join(name, b->prefix, "embed_tokens");
    if (bind_matrix(b, name, V, H, &w->embed)) return b->e->code;
    bind_join(name, b->prefix, "norm.weight");
    if (bind_vector(b, name, 1, &H, job->norm_add, &w->norm)) return b->e->code;
    w->tied = 1;
    w->lm_head = w->embed;
    for (int i = 0; i < N_PREFIXES && w->tied; i++)
        if (has_module(b, "", head_names[i])) {
            if (bind_matrix(b, head_names[i], V, H, &w->lm_head)) return b->e->code;
            w->tied = 0;
        }
    if (w->tied && b->says_untied)
        return bind_missing(b, strncmp(b->prefix, "lang", 4) ? head_names[0] : head_names[1],
                            ".weight");
    return ERR_NONE;
}

static err_code bind_layers(binder *b, const layer_job *job, weights *w)
{
    const model_config *c = job->c;
    char prefix[BIND_NAME], local[64];
    layer_job one = *job;
    one.prefix = prefix;
    w->layers = bind_alloc(b, (size_t)c->n_layers, sizeof *w->layers);
    if (!w->layers) return ERR_MEMORY;
    for (int i = 0; i < c->n_layers; i++) {
        snprintf(local, sizeof local, "layers.%d.", i);
        bind_join(prefix, b->prefix, local);
        if (bind_layer(&one, c->is_full[i], &w->layers[i])) return b->e->code;
    }
    return ERR_NONE;
}

static int starts_with(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

static const char *find_mtp(const binder *b)
{
    for (int64_t i = 0; i < st_count(b->set); i++)
        for (int k = 0; k < N_PREFIXES; k++)
            if (starts_with(st_at(b->set, i)->name, mtp_prefixes[k])) return mtp_prefixes[k];
    return NULL;
}

/* Converters that finished the trunk's norms did not always finish those of MTP, and raw MTP files
 * are put beside converted trunks: mlx-node's rule is to look at the first norm. Raw ones scatter
 * around 0, finished ones around 1. */
static err_code mtp_norm_add(binder *b, layer_job *job)
{
    const float *norm;
    float sum = 0;
    if (job->norm_add != 0) return ERR_NONE;
    if (layer_vector(job, "layers.0.input_layernorm.weight", job->c->hidden_size, 0, &norm))
        return b->e->code;
    for (int i = 0; i < job->c->hidden_size; i++) sum += norm[i];
    job->norm_add = sum < 0.5f * (float)job->c->hidden_size;
    return ERR_NONE;
}

static err_code bind_mtp(binder *b, const layer_job *trunk, mtp_weights *m)
{
    layer_job job = *trunk;
    int64_t H = job.c->hidden_size;
    job.prefix = find_mtp(b);
    if (!job.prefix) return ERR_NONE;
    char fc[BIND_NAME], layer[BIND_NAME];
    bind_join(fc, job.prefix, "fc");
    bind_join(layer, job.prefix, "layers.0.");
    if (mtp_norm_add(b, &job) || bind_matrix(b, fc, H, 2 * H, &m->fc) ||
        layer_vector(&job, "pre_fc_norm_embedding.weight", H, job.norm_add, &m->norm_embedding) ||
        layer_vector(&job, "pre_fc_norm_hidden.weight", H, job.norm_add, &m->norm_hidden) ||
        layer_vector(&job, "norm.weight", H, job.norm_add, &m->norm))
        return b->e->code;
    job.prefix = layer;
    if (bind_layer(&job, 1, &m->layer)) return b->e->code;
    m->present = 1;
    return ERR_NONE;
}

static err_code check_leftovers(const binder *b, weights *w)
{
    for (int64_t i = 0; i < st_count(b->set); i++) {
        const st_tensor *t = st_at(b->set, i);
        int is_vision = 0;
        if (b->used[i]) continue;
        for (size_t k = 0; k < sizeof vision_prefixes / sizeof *vision_prefixes; k++)
            is_vision |= starts_with(t->name, vision_prefixes[k]);
        if (!is_vision)
            return err_set(b->e, ERR_FORMAT, "tensor %s has no place in this model (%s)", t->name,
                           t->file);
        w->n_ignored++;
    }
    return ERR_NONE;
}

/* ---- walking -------------------------------------------------------------------------------- */

typedef struct walk {
    const model_config *c;
    weights_fn fn;
    void *ctx;
} walk;

static int walk_places(const walk *k, const char *prefix, const place *p, const void *base)
{
    char name[BIND_NAME];
    int stop = 0;
    for (; p->name && !stop; p++) {
        bind_join(name, prefix, p->name);
        stop = k->fn(k->ctx, name, at_place(base, p));
    }
    return stop;
}

static int walk_layer(const walk *k, const char *prefix, int is_full, const layer_weights *l)
{
    char expert[BIND_NAME], local[64];
    int stop = walk_places(k, prefix, mixer_places(is_full), l);
    if (!stop) stop = walk_places(k, prefix, ffn_places(k->c), l);
    for (int i = 0; i < k->c->n_experts && !stop; i++) {
        snprintf(local, sizeof local, "mlp.experts.%d.", i);
        bind_join(expert, prefix, local);
        stop = walk_places(k, expert, expert_places, &l->experts[i]);
    }
    return stop;
}

int weights_each(const weights *w, const model_config *c, weights_fn fn, void *ctx)
{
    const walk k = {.c = c, .fn = fn, .ctx = ctx};
    char prefix[BIND_NAME];
    int stop = fn(ctx, "embed_tokens", &w->embed);
    for (int i = 0; i < c->n_layers && !stop; i++) {
        snprintf(prefix, sizeof prefix, "layers.%d.", i);
        stop = walk_layer(&k, prefix, c->is_full[i], &w->layers[i]);
    }
    if (!stop && !w->tied) stop = fn(ctx, "lm_head", &w->lm_head);
    if (!stop && w->mtp.present) stop = fn(ctx, "mtp.fc", &w->mtp.fc);
    if (!stop && w->mtp.present) stop = walk_layer(&k, "mtp.layers.0.", 1, &w->mtp.layer);
    return stop;
}

/* ---- open and close ------------------------------------------------------------------------- */

static int add_bytes(void *ctx, const char *name, const num_matrix *m)
{
    weights *w = ctx;
    if (!starts_with(name, "mtp.")) w->bytes_by_mode[m->mode] += num_matrix_bytes(m);
    return 0;
}

static err_code bind_all(binder *b, weights *w, const model_config *c)
{
    if (find_prefix(b)) return b->e->code;
    int hf = is_hf_layout(b, c);
    layer_job job = {.b = b, .c = c, .norm_add = hf ? 1.0f : 0.0f, .conv_last = hf};
    if (bind_ends(b, &job, w) || bind_layers(b, &job, w) || bind_mtp(b, &job, &w->mtp) ||
        check_leftovers(b, w))
        return b->e->code;
    model_config as_bound = *c;
    as_bound.tied = w->tied;
    w->n_parameters = config_parameters(&as_bound);
    w->family = b->ct || b->n_packed ? "compressed-tensors" : !hf || b->n_mlx ? "mlx" : "hf";
    weights_each(w, c, add_bytes, w);
    return ERR_NONE;
}

err_code weights_bind(weights *w, const model_config *c, const st_set *set, const json_value *root,
                      err_info *e)
{
    err_info own;
    binder b;
    memset(w, 0, sizeof *w);
    if (!e) e = &own;
    err_code code = bind_open(&b, set, root, e);
    if (!code) code = bind_all(&b, w, c);
    bind_close(&b);
    w->owned = b.arena;
    if (code) weights_free(w);
    return code;
}

void weights_free(weights *w)
{
    bind_arena_free(w->owned);
    memset(w, 0, sizeof *w);
}
