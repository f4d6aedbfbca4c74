/* weights: every tensor of a checkpoint bound to its place in the forward pass.
 *
 * Matrices are num_matrix views of the mapped files, whatever they are stored as; vectors (norms,
 * convolution, decay) are small and are widened to f32 at load, norms with the 1 of zero-centred
 * checkpoints already added. Owned by the weights, borrowed by everybody else, immutable.
 *
 * The checkpoint decides: names (prefixes model., model.language_model., language_model.model.),
 * expert layout (fused, stacked, one tensor per expert) and per-module format are read off the
 * tensors present; config.json's quantization blocks are checked against shapes. */
#ifndef MODEL_WEIGHTS_H
#define MODEL_WEIGHTS_H

#include "io/st.h"
#include "model/config.h"
#include "num/matrix.h"

typedef struct gdn_weights {         /* Gated DeltaNet mixer */
    num_matrix in_proj_qkv;          /* [conv_width, H] rows q, k, v */
    num_matrix in_proj_z;            /* [value_width, H] */
    num_matrix in_proj_b, in_proj_a; /* [v_heads, H] */
    num_matrix out_proj;             /* [H, value_width] */
    const float *conv;      /* [conv_width, conv_kernel], last column is the current token */
    const float *neg_exp_a; /* [v_heads] -exp(A_log) */
    const float *dt_bias;   /* [v_heads] */
    const float *norm;      /* [v_dim] plain weight of the gated norm */
} gdn_weights;

typedef struct attn_weights {  /* gated attention mixer */
    num_matrix q_proj;         /* [heads * 2 * head_dim, H] per head: query rows, then gate rows */
    num_matrix k_proj, v_proj; /* [kv_heads * head_dim, H] */
    num_matrix o_proj;         /* [H, heads * head_dim] */
    const float *q_norm, *k_norm; /* [head_dim] 1 added */
} attn_weights;

typedef struct mlp_weights {       /* one gated MLP: down(silu(gate x) * up x) */
    num_matrix gate_proj, up_proj; /* [I, H] */
    num_matrix down_proj;          /* [H, I] */
} mlp_weights;

typedef struct layer_weights {
    const float *input_norm, *post_norm; /* [H] 1 added */
    gdn_weights gdn;                     /* linear layers */
    attn_weights attn;                   /* full layers */
    mlp_weights mlp;                     /* the dense FFN, or the shared expert */
    num_matrix router;                   /* [E, H] MoE only */
    num_matrix shared_gate;              /* [1, H] MoE only */
    mlp_weights *experts;                /* [E] MoE only */
} layer_weights;

typedef struct mtp_weights { /* multi-token prediction block; see forward_mtp */
    int present;
    num_matrix fc;               /* [H, 2H]: embedding half first */
    const float *norm_embedding; /* [H] 1 added */
    const float *norm_hidden;    /* [H] 1 added */
    const float *norm;           /* [H] 1 added */
    layer_weights layer;         /* a full-attention layer */
} mtp_weights;

typedef struct weights {
    num_matrix embed;      /* [V, H] */
    num_matrix lm_head;    /* [V, H]; the embedding again when tied */
    const float *norm;     /* [H] 1 added */
    layer_weights *layers; /* [n_layers] */
    mtp_weights mtp;
    int tied;

    /* for reports */
    int64_t n_parameters; /* text stack, without MTP: config_parameters with `tied` as found */
    int64_t bytes_by_mode[NUM_N_MODES]; /* matrices of the text stack, scales and biases included */
    int64_t n_ignored;                  /* tensors of vision towers and the like */
    const char *family;                 /* "hf", "mlx" or "compressed-tensors" */
    void *owned;                        /* arena of vectors and expert tables */
} weights;

/* Binds and checks every tensor of the text stack; vision tensors are counted and left alone,
 * unknown ones are an error that names the tensor. Vectors must be finite; matrices are not looked
 * into, which would read tens of gigabytes. root: config.json. `set` must outlive w. */
err_code weights_bind(weights *w, const model_config *c, const st_set *set, const json_value *root,
                      err_info *e);
void weights_free(weights *w);

/* Calls fn for every matrix in the order of the forward pass, experts one by one; the tied head
 * not again. Names are those of Hugging Face below the text stack: "embed_tokens",
 * "layers.3.mlp.experts.7.gate_proj", "lm_head", "mtp.fc". Stops when fn returns non-zero and
 * returns that. */
typedef int (*weights_fn)(void *ctx, const char *name, const num_matrix *m);
int weights_each(const weights *w, const model_config *c, weights_fn fn, void *ctx);

#endif
