/* tap: somebody who looks at what the matrices of a forward pass multiply.
 *
 * Readers of one input share a site: q_proj, k_proj and v_proj all read TAP_MIXER_IN. Rows arrive
 * in the order of the sequence, those of a batch at once or in parts, on the thread that
 * evaluates, between two loops of the model's pool, which the tap may use. They are borrowed and
 * may not be changed. A pass without a tap pays one comparison per site. */
#ifndef MODEL_TAP_H
#define MODEL_TAP_H

#include <stdint.h>

typedef enum tap_site {
    TAP_MIXER_IN,  /* [n][H] q_proj, k_proj, v_proj; in_proj_qkv, in_proj_z, in_proj_b, in_proj_a */
    TAP_MIXER_OUT, /* [n][Nq*D] o_proj; [n][Nv*Dv] out_proj */
    TAP_FFN_IN,    /* [n][H] gate_proj and up_proj, dense or shared; router and shared_gate */
    TAP_FFN_DOWN,  /* [n][I] down_proj, dense or shared */
    TAP_EXPERT_IN, /* [n*k][H] experts' gate_proj and up_proj */
    TAP_EXPERT_DOWN, /* [n*k][I] experts' down_proj */
    TAP_HEAD,        /* [n][H] lm_head; layer is n_layers */
    TAP_N_SITES
} tap_site;

typedef struct tap_rows {
    tap_site site;
    int layer;      /* n_layers for the MTP block and the head */
    const float *x; /* [n][cols] */
    int64_t n, cols;
    const int32_t *first; /* experts' sites: [E+1], rows first[e] .. first[e+1]-1 are expert e's */
} tap_rows;

typedef struct tap {
    void (*look)(void *ctx, const tap_rows *rows);
    void *ctx;
} tap;

#endif
