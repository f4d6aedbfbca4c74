/* config.json to numbers. Every value is checked here once, so that the binder and the forward
 * pass may multiply widths without overflow and divide without looking.
 *
 * Field names, defaults and fallbacks: transformers, models/qwen3_5/configuration_qwen3_5.py and
 * models/qwen3_5_moe/configuration_qwen3_5_moe.py; rotary frequencies: modeling_rope_utils.py. */
#include "model/config.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"

/* Far above any published model; low enough that heads times head_dim fits an int, that the number
 * of all weights, 3 * layers * experts * two widths at most, fits an int64, and that no table of
 * layers or experts exhausts memory because of a typo. */
enum {
    MAX_VOCAB = 1 << 24,
    MAX_WIDTH = 1 << 18,
    MAX_LAYERS = 4096,
    MAX_HEADS = 4096,
    MAX_HEAD_DIM = 8192,
    MAX_EXPERTS = 4096,
};

typedef struct reader {
    const json_value *text; /* text_config, or the root of a text-only file */
    const json_value *root;
    err_info *e;
} reader;

static int is_given(const json_value *object, const char *key)
{
    return json_type_of(json_get(object, key)) != JSON_NULL;
}

static err_code read_int(const reader *r, const char *key, int fallback, int min, int max, int *out)
{
    const json_value *v = json_get(r->text, key);
    json_type type = json_type_of(v);
    if (type == JSON_NULL) {
        *out = fallback;
        return ERR_NONE;
    }
    int64_t n = json_int(v, INT64_MIN);
    if (type != JSON_INT || n < min || n > max)
        return err_set(r->e, ERR_RANGE, "config.json: %s must be an integer from %d to %d", key,
                       min, max);
    *out = (int)n;
    return ERR_NONE;
}

static err_code read_number(const reader *r, const json_value *object, const char *key,
                            double fallback, double min, double max, double *out)
{
    const json_value *v = json_get(object, key);
    json_type type = json_type_of(v);
    *out = type == JSON_NULL ? fallback : json_float(v, NAN);
    if (type != JSON_NULL && type != JSON_INT && type != JSON_FLOAT) *out = NAN;
    if (*out >= min && *out <= max) return ERR_NONE;
    return err_set(r->e, ERR_RANGE, "config.json: %s must be a number from %g to %g", key, min,
                   max);
}

static err_code refuse(const reader *r, const char *what)
{
    return err_set(r->e, ERR_UNSUPPORTED, "config.json: %s is not supported", what);
}

/* ---- what the forward pass takes for granted ----------------------------------------------- */

static err_code read_model_type(model_config *c, const reader *r)
{
    static const char *const known[][2] = {{"qwen3_5", "qwen3_5_text"},
                                           {"qwen3_5_text", "qwen3_5_text"},
                                           {"qwen3_5_moe", "qwen3_5_moe_text"},
                                           {"qwen3_5_moe_text", "qwen3_5_moe_text"}};
    const char *type = json_string(json_get(r->text, "model_type"), NULL);
    if (!type) type = json_string(json_get(r->root, "model_type"), NULL);
    if (!type) return err_set(r->e, ERR_FORMAT, "config.json: model_type is missing");
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(type, known[i][0]) == 0) {
            snprintf(c->model_type, sizeof c->model_type, "%s", known[i][1]);
            c->is_moe = strstr(c->model_type, "moe") != NULL;
            return ERR_NONE;
        }
    return err_set(r->e, ERR_UNSUPPORTED,
                   "config.json: model_type \"%.60s\" is not supported (qwen3_5, qwen3_5_moe and "
                   "their text parts are)",
                   type);
}

static int is_silu(const json_value *v)
{
    const char *name = json_string(v, NULL);
    return json_type_of(v) == JSON_NULL ||
           (name && (strcmp(name, "silu") == 0 || strcmp(name, "swish") == 0));
}

/* Switches that ancestors and relatives have; any other setting changes the forward pass. */
static err_code check_features(const model_config *c, const reader *r)
{
    const json_value *t = r->text;
    if (json_bool(json_get(t, "attention_bias"), 0)) return refuse(r, "attention_bias true");
    if (!json_bool(json_get(t, "attn_output_gate"), 1)) return refuse(r, "attn_output_gate false");
    if (!is_silu(json_get(t, "hidden_act"))) return refuse(r, "a hidden_act other than silu");
    if (!is_silu(json_get(t, "output_gate_type")))
        return refuse(r, "an output_gate_type other than swish");
    if (!c->is_moe) return ERR_NONE;
    if (!json_bool(json_get(t, "norm_topk_prob"), 1)) return refuse(r, "norm_topk_prob false");
    if (json_int(json_get(t, "decoder_sparse_step"), 1) != 1)
        return refuse(r, "a decoder_sparse_step other than 1");
    if (json_length(json_get(t, "mlp_only_layers")) > 0)
        return refuse(r, "a non-empty mlp_only_layers");
    return ERR_NONE;
}

static err_code read_sizes(model_config *c, const reader *r)
{
    int moe = c->is_moe;
    double eps;
    if (read_int(r, "vocab_size", 248320, 1, MAX_VOCAB, &c->vocab_size) ||
        read_int(r, "hidden_size", moe ? 2048 : 4096, 1, MAX_WIDTH, &c->hidden_size) ||
        read_int(r, "num_hidden_layers", moe ? 40 : 32, 1, MAX_LAYERS, &c->n_layers) ||
        read_int(r, "max_position_embeddings", 32768, 1, INT_MAX, &c->max_positions) ||
        read_int(r, "num_attention_heads", 16, 1, MAX_HEADS, &c->n_heads) ||
        read_int(r, "num_key_value_heads", moe ? 2 : 4, 1, MAX_HEADS, &c->n_kv_heads) ||
        read_int(r, "head_dim", 256, 1, MAX_HEAD_DIM, &c->head_dim) ||
        read_int(r, "linear_num_key_heads", 16, 1, MAX_HEADS, &c->lin_k_heads) ||
        read_int(r, "linear_num_value_heads", 32, 1, MAX_HEADS, &c->lin_v_heads) ||
        read_int(r, "linear_key_head_dim", 128, 1, MAX_HEAD_DIM, &c->lin_k_dim) ||
        read_int(r, "linear_value_head_dim", 128, 1, MAX_HEAD_DIM, &c->lin_v_dim) ||
        read_int(r, "linear_conv_kernel_dim", 4, 2, CONFIG_MAX_TAPS, &c->conv_kernel) ||
        read_int(r, "mtp_num_hidden_layers", 0, 0, MAX_LAYERS, &c->n_mtp_layers) ||
        read_number(r, r->text, "rms_norm_eps", 1e-6, 0, 1, &eps))
        return r->e->code;
    c->rms_eps = (float)eps;
    if (!moe) return read_int(r, "intermediate_size", 12288, 1, MAX_WIDTH, &c->intermediate_size);
    if (read_int(r, "num_experts", 256, 1, MAX_EXPERTS, &c->n_experts) ||
        read_int(r, "num_experts_per_tok", 8, 1, c->n_experts, &c->n_experts_used) ||
        read_int(r, "moe_intermediate_size", 512, 1, MAX_WIDTH, &c->moe_intermediate_size) ||
        read_int(r, "shared_expert_intermediate_size", 512, 1, MAX_WIDTH,
                 &c->shared_intermediate_size))
        return r->e->code;
    return ERR_NONE;
}

static err_code check_sizes(const model_config *c, const reader *r)
{
    if (c->n_heads % c->n_kv_heads)
        return err_set(r->e, ERR_RANGE,
                       "config.json: num_attention_heads %d is no multiple of num_key_value_heads "
                       "%d",
                       c->n_heads, c->n_kv_heads);
    if (c->lin_v_heads % c->lin_k_heads)
        return err_set(r->e, ERR_RANGE,
                       "config.json: linear_num_value_heads %d is no multiple of "
                       "linear_num_key_heads %d",
                       c->lin_v_heads, c->lin_k_heads);
    return ERR_NONE;
}

/* ---- layer kinds --------------------------------------------------------------------------- */

static err_code read_layer_types(model_config *c, const reader *r)
{
    c->is_full = mem_array((size_t)c->n_layers, 1, r->e);
    if (!c->is_full) return ERR_MEMORY;
    const json_value *types = json_get(r->text, "layer_types");
    if (json_type_of(types) == JSON_NULL) {
        int interval = 4;
        if (read_int(r, "full_attention_interval", 4, 1, MAX_LAYERS, &interval)) return r->e->code;
        for (int i = 0; i < c->n_layers; i++) c->is_full[i] = (i + 1) % interval == 0;
        return ERR_NONE;
    }
    if (json_type_of(types) != JSON_ARRAY || json_length(types) != (size_t)c->n_layers)
        return err_set(r->e, ERR_FORMAT,
                       "config.json: layer_types must list num_hidden_layers = %d kinds",
                       c->n_layers);
    for (int i = 0; i < c->n_layers; i++) {
        const char *kind = json_string(json_at(types, (size_t)i), NULL);
        c->is_full[i] = kind && strcmp(kind, "full_attention") == 0;
        if (!c->is_full[i] && (!kind || strcmp(kind, "linear_attention") != 0))
            return err_set(r->e, ERR_UNSUPPORTED,
                           "config.json: layer_types[%d] \"%.60s\" is not "
                           "supported",
                           i, kind ? kind : "");
    }
    return ERR_NONE;
}

/* ---- rotary frequencies -------------------------------------------------------------------- */

typedef struct yarn {
    double factor, original, beta_fast, beta_slow;
    double low, high; /* frequency indices between which interpolation fades in */
} yarn;

/* Index (not whole) of the frequency that turns `turns` times within the original context. */
static double yarn_dim(const yarn *y, double turns, int dim, double theta)
{
    return dim * log(y->original / (turns * 2 * M_PI)) / (2 * log(theta));
}

static double yarn_mscale(double factor, double mscale)
{
    return factor <= 1 ? 1.0 : 0.1 * mscale * log(factor) + 1.0;
}

/* modeling_rope_utils.py, _compute_yarn_parameters. `factor` counts as given, whatever the ratio
 * of the two context lengths says. */
static err_code read_yarn(yarn *y, model_config *c, const reader *r, const json_value *rope,
                          double theta)
{
    double ratio, attention, mscale, mscale_all;
    if (read_number(r, rope, "original_max_position_embeddings", c->max_positions, 1, INT_MAX,
                    &y->original))
        return r->e->code;
    ratio = c->max_positions / y->original;
    if (read_number(r, rope, "factor", ratio < 1 ? 1 : ratio, 1, 1e6, &y->factor) ||
        read_number(r, rope, "attention_factor", 0, 0, 1e6, &attention) ||
        read_number(r, rope, "mscale", 0, 0, 1e6, &mscale) ||
        read_number(r, rope, "mscale_all_dim", 0, 0, 1e6, &mscale_all) ||
        read_number(r, rope, "beta_fast", 32, 0, 1e6, &y->beta_fast) ||
        read_number(r, rope, "beta_slow", 1, 0, 1e6, &y->beta_slow))
        return r->e->code;
    if (y->beta_fast == 0) y->beta_fast = 32;
    if (y->beta_slow == 0) y->beta_slow = 1;
    if (is_given(rope, "attention_factor"))
        c->rope_scale = (float)attention;
    else if (mscale > 0 && mscale_all > 0)
        c->rope_scale =
            (float)(yarn_mscale(y->factor, mscale) / yarn_mscale(y->factor, mscale_all));
    else
        c->rope_scale = (float)yarn_mscale(y->factor, 1);
    y->low = yarn_dim(y, y->beta_fast, c->rotary_dim, theta);
    y->high = yarn_dim(y, y->beta_slow, c->rotary_dim, theta);
    if (json_bool(json_get(rope, "truncate"), 1)) {
        y->low = floor(y->low);
        y->high = ceil(y->high);
    }
    y->low = fmax(y->low, 0);
    y->high = fmin(y->high, c->rotary_dim - 1);
    if (y->low == y->high) y->high += 0.001;
    return ERR_NONE;
}

/* In float like the reference: at position 2^18 the last bit of a frequency is a hundredth of a
 * turn, and models were trained with the rounded ones. */
static void fill_inv_freq(model_config *c, double theta, const yarn *y)
{
    for (int j = 0; j < c->rotary_dim / 2; j++) {
        float period = powf((float)theta, (float)(2 * j) / (float)c->rotary_dim);
        float plain = 1.0f / period;
        c->inv_freq[j] = plain;
        if (!y) continue;
        float stretched = 1.0f / ((float)y->factor * period);
        float ramp = ((float)j - (float)y->low) / (float)(y->high - y->low);
        float keep = 1.0f - fminf(fmaxf(ramp, 0.0f), 1.0f);
        c->inv_freq[j] = stretched * (1.0f - keep) + plain * keep;
    }
}

/* rope_parameters wins over the older rope_scaling; rope_theta and partial_rotary_factor beside
 * them only fill gaps. Multimodal sections reduce to plain rotation for text. */
static err_code read_rope(model_config *c, const reader *r)
{
    const json_value *rope = json_get(r->text, "rope_parameters");
    if (json_type_of(rope) == JSON_NULL) rope = json_get(r->text, "rope_scaling");
    const char *type = json_string(json_get(rope, "rope_type"), NULL);
    if (!type) type = json_string(json_get(rope, "type"), NULL);
    if (!type) type = "default";
    int is_yarn = strcmp(type, "yarn") == 0;
    if (!is_yarn && strcmp(type, "default") != 0)
        return err_set(r->e, ERR_UNSUPPORTED,
                       "config.json: rope_type \"%.60s\" is not supported (default and yarn are)",
                       type);

    double theta, partial;
    if (read_number(r, is_given(rope, "rope_theta") ? rope : r->text, "rope_theta", 10000, 1.0001,
                    1e12, &theta) ||
        read_number(r, is_given(rope, "partial_rotary_factor") ? rope : r->text,
                    "partial_rotary_factor", 0.25, 0, 1, &partial))
        return r->e->code;
    c->rotary_dim = (int)(c->head_dim * partial);
    if (c->rotary_dim < 2 || c->rotary_dim % 2)
        return err_set(r->e, ERR_RANGE,
                       "config.json: head_dim %d x partial_rotary_factor %g gives %d rotary "
                       "dimensions, not a positive even number",
                       c->head_dim, partial, c->rotary_dim);
    c->inv_freq = mem_array((size_t)c->rotary_dim / 2, sizeof *c->inv_freq, r->e);
    if (!c->inv_freq) return ERR_MEMORY;
    c->rope_scale = 1;
    yarn y;
    if (is_yarn && read_yarn(&y, c, r, rope, theta)) return r->e->code;
    fill_inv_freq(c, theta, is_yarn ? &y : NULL);
    return ERR_NONE;
}

/* -------------------------------------------------------------------------------------------- */

err_code config_read(model_config *c, const json_value *root, err_info *e)
{
    err_info own;
    memset(c, 0, sizeof *c);
    reader r = {.text = json_get(root, "text_config"), .root = root, .e = e ? e : &own};
    if (json_type_of(root) != JSON_OBJECT)
        return err_set(r.e, ERR_FORMAT, "config.json: an object is expected");
    if (json_type_of(r.text) == JSON_NULL) r.text = root;
    if (json_type_of(r.text) != JSON_OBJECT)
        return err_set(r.e, ERR_FORMAT, "config.json: text_config must be an object");
    c->tied = json_bool(
        json_get(is_given(root, "tie_word_embeddings") ? root : r.text, "tie_word_embeddings"), 0);
    if (read_model_type(c, &r) || check_features(c, &r) || read_sizes(c, &r) ||
        check_sizes(c, &r) || read_layer_types(c, &r) || read_rope(c, &r)) {
        config_free(c);
        return r.e->code;
    }
    return ERR_NONE;
}

void config_free(model_config *c)
{
    mem_free(c->is_full);
    mem_free(c->inv_freq);
    memset(c, 0, sizeof *c);
}

int64_t config_parameters(const model_config *c)
{
    int64_t H = c->hidden_size, D = c->head_dim;
    int64_t full = H * c->n_heads * D * 3 + 2 * H * c->n_kv_heads * D + 2 * D;
    int64_t conv = config_conv_width(c), value = config_value_width(c), heads = c->lin_v_heads;
    int64_t linear =
        H * (conv + 2 * value + 2 * heads) + conv * c->conv_kernel + 2 * heads + c->lin_v_dim;
    int64_t ffn = 3 * H * c->intermediate_size;
    if (c->is_moe)
        ffn = 3 * H * c->n_experts * c->moe_intermediate_size + H * c->n_experts +
              3 * H * c->shared_intermediate_size + H;
    int64_t n = H * c->vocab_size * (c->tied ? 1 : 2) + H;
    for (int i = 0; i < c->n_layers; i++) n += (c->is_full[i] ? full : linear) + ffn + 2 * H;
    return n;
}
