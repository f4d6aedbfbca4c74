/* config: the numbers of a Qwen3.5 / Qwen3.6 text model, from config.json.
 *
 * A plain value; `is_full` and `inv_freq` are owned and freed by config_free. Words
 * are those of config.json where it has one. Defaults for absent fields are those of
 * transformers' Qwen3_5TextConfig / Qwen3_5MoeTextConfig. */
#ifndef MODEL_CONFIG_H
#define MODEL_CONFIG_H

#include <stdint.h>

#include "base/err.h"
#include "io/json.h"

/* Taps of the convolution at most: what the mixer has room for. */
enum { CONFIG_MAX_TAPS = 16 };

typedef struct model_config {
    int vocab_size;  /* V, rows of the embedding, padding included */
    int hidden_size; /* H */
    int n_layers;    /* L, without MTP */
    int max_positions;
    float rms_eps;
    int tied; /* as config.json says; the presence of lm_head.weight decides */

    uint8_t *is_full; /* [n_layers] 1: gated attention, 0: Gated DeltaNet */

    /* gated attention */
    int n_heads, n_kv_heads, head_dim;
    int rotary_dim;   /* first dims of a head that rotate, even */
    float *inv_freq;  /* [rotary_dim / 2] radians per position, YaRN applied */
    float rope_scale; /* on cos and sin; 1 without YaRN */

    /* Gated DeltaNet */
    int lin_k_heads, lin_v_heads, lin_k_dim, lin_v_dim;
    int conv_kernel; /* taps, 2..CONFIG_MAX_TAPS */

    /* feed-forward: dense has n_experts == 0 */
    int intermediate_size;
    int n_experts, n_experts_used, moe_intermediate_size, shared_intermediate_size;

    int n_mtp_layers; /* blocks that config.json announces */
    int is_moe;
    char model_type[32]; /* of the text part: qwen3_5_text or qwen3_5_moe_text */
} model_config;

/* root: config.json as a whole, wrapper (text_config inside) or text-only. Refuses other model
 * types, shapes that contradict each other, and features that the forward pass lacks, by name. */
err_code config_read(model_config *c, const json_value *root, err_info *e);
void config_free(model_config *c);

/* Weights of the text stack without MTP, as many as an unquantized checkpoint holds; `tied`
 * counts the embedding once. */
int64_t config_parameters(const model_config *c);

/* Derived widths. */
static inline int config_key_width(const model_config *c)
{
    return c->lin_k_heads * c->lin_k_dim;
}
static inline int config_value_width(const model_config *c)
{
    return c->lin_v_heads * c->lin_v_dim;
}
static inline int config_conv_width(const model_config *c)
{
    return 2 * config_key_width(c) + config_value_width(c);
}

#endif
