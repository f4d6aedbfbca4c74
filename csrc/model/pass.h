/* pass: what the parts of a forward pass share. Internal to the model room.
 *
 * A pass takes a batch of n <= SES_BATCH tokens, of one or several sequences, through the layers.
 * Shapes use
 *   n tokens · H hidden · Nk, Nv key and value heads of Dk, Dv · C = 2 Nk Dk + Nv Dv · K taps
 *   Nq query heads, Nkv key/value heads of D · E experts, k used, of width I · V vocabulary
 * No part may let one token's result depend on the other tokens of its batch, except through the
 * state that runs along its sequence: this is what makes results independent of how a prompt is
 * cut into calls, and of who else is in the batch.
 *
 * A batch that is cancelled cuts the model's pool, whose loops then do nothing: what is computed
 * outside of loops from what they made asks pool_is_cut before. */
#ifndef MODEL_PASS_H
#define MODEL_PASS_H

#include "model/kv_page.h"
#include "model/model.h"
#include "model/tap.h"

/* Rows that are scored at once: a pass over lm_head serves this many. */
enum { SES_SCORE_ROWS = 16 };

/* Rows that a dense FFN computes at once, at most: its gates for a whole batch would be half of all
 * scratch, and in halves no prompt was seen to take longer. */
enum { FFN_ROWS = SES_BATCH / 2 };

/* Tokens pos .. pos+n-1 of a session, which are rows first .. first+n-1 of the batch. */
typedef struct span {
    ses *s;
    int64_t pos, first, n;
} span;

/* The workspace of a model: what a batch is computed in, whosever tokens it holds. */
struct pass {
    model *m;
    const span *spans; /* [n_spans] of the batch being computed */
    int n_spans;
    const span **row_span; /* [n] of each row */

    float *x;              /* [n][H] residual stream */
    float *u;              /* [n][H] its norm: what the layer's matrices read */
    float *y;              /* [n][H] what a mixer or FFN adds to x */
    float *conv_in;        /* [n][C] rows that enter the convolution */
    float *conv_out;       /* q, k, v after convolution: [2 Nk + Nv heads][n][their width] */
    float *z;              /* [n][Nv*Dv] output gate, then the gated output */
    float *b, *a;          /* [n][Nv], then beta and decay */
    float *qg;             /* [n][Nq][2*D] queries and gates */
    float *q;              /* [Nkv][n][Nq/Nkv][D] queries, normed and rotated */
    char *query_codes;     /* q as integers, [Nkv][n][Nq/Nkv] rows; NULL: attention in f32 */
    float *k, *v;          /* [n][Nkv*D] */
    float *heads;          /* [n][Nq*D] attention output */
    float *cos, *sin;      /* [n][rotary/2] of the rows' positions */
    float *router;         /* [n][E] */
    int32_t *expert_ids;   /* [n][k] */
    float *expert_weights; /* [n][k] */
    int32_t *expert_rows;  /* [n][k] row of (token, slot) in the arrays below */
    int32_t *expert_token; /* [n*k] whose row it is */
    int32_t *expert_first; /* [E+1] first row of each expert */
    float *xe;             /* [n*k][H] inputs sorted by expert; pages, untouched unless wanted */
    float *gate, *up;      /* [n*k + n][I] routed rows, then shared; dense [FFN_ROWS][I] */
    float *down;           /* [n*k + n][H] */
    float *shared;         /* [n] the shared expert's gate */
    kern_job *jobs;        /* [2 * (E + 1)] */
    float *mtp_in;         /* [n][2*H] */
    void *kern;            /* kern_linear's, per worker */
    void *kern_rows;       /* what matrices read, rounded; NULL when the model runs in f32 */
    char *attn_work;       /* per worker attn_work_bytes */
    float *scored;         /* [SES_SCORE_ROWS][V]; pages, untouched unless wanted */
    float *found;          /* [n_found][Nq/Nkv][D], then tops and sums; pages */
    int64_t n_found;       /* (row, head of keys, block) triples that attention can put aside */
    int64_t kern_cols;     /* widest matrix */
    const tap *tap;        /* NULL: nobody looks */
    profile *profile;      /* of the batch; NULL: nobody counts */
    int64_t kv_bytes;      /* cached keys and values that the batch reads in one layer */
    int layer;             /* being computed, for the tap */
    void *arena;           /* all but what has pages of its own; parts of a layer share theirs */
    size_t arena_bytes;
};

typedef struct pass pass;

pass *pass_open(model *m, err_info *e);
void pass_close(pass *p);

struct ses {
    model *m;
    kv_codec codec;
    int64_t n_ctx, n_past;
    int32_t *ids;    /* [n_ctx] */
    kv_pool *kv;     /* the model's, of this codec */
    kv_page **pages; /* [ceil(n_ctx / KV_PAGE_ROWS)], NULL where nothing was written yet */
    int64_t n_mtp;   /* rows in the MTP block's cache */
    int *slot;       /* [n_layers] rank among the linear layers, or among the full ones */
    int n_linear;
    float *S;      /* [n_linear][Nv][Dv][Dk] recurrent state, keys contiguous */
    float *conv;   /* [n_linear][K-1][C] last raw rows, oldest first */
    float *logits; /* [V] after logits_at tokens */
    int64_t logits_at;
    float *saved; /* S and conv before a batch that may be cancelled; pages */
    int is_profiled;
    profile profile;
};

/* A session whose layers all share slot 0: its state and cache serve one layer after the other. */
ses *ses_open_single(model *m, const ses_options *options, err_info *e);

/* Floats of S and of conv; both to s->saved and back. */
int64_t ses_S_floats(const ses *s);
int64_t ses_conv_floats(const ses *s);
void ses_save_state(ses *s);
void ses_restore_state(ses *s);
/* Gives up every page of the cache. */
void ses_drop_pages(ses *s);

/* Cache slots of a sequence: the full layers in order, then the MTP block's. */
int kv_n_slots(const model *m);
int kv_mtp_slot(const model *m);
int64_t kv_row_bytes(const model *m, kv_codec codec);
int64_t kv_page_bytes(const model *m, kv_codec codec); /* with sizes, see kern_kv */
int64_t kv_n_pages(int64_t n_rows);
/* Makes positions [pos, pos + n) writable: pages of the session's own. */
void kv_own(ses *s, int64_t pos, int64_t n);
void kv_write(ses *s, int slot, int64_t pos, const float *key, const float *value);
void kv_read(const ses *s, int slot, int64_t pos, float *key, float *value);
/* Head h of the keys or values in page `page`, as kern_kv has them. */
typedef enum kv_which { KV_KEY, KV_VALUE } kv_which;
const void *kv_head(const ses *s, int slot, kv_which which, int64_t page, int h);

/* Begins a batch of these spans, whose rows follow one another from 0: positions, and pages that
 * can be written. The spans stay the caller's and must last until pass_end. Returns the rows. */
int64_t pass_begin(pass *p, const span *spans, int n_spans);
void pass_end(pass *p);

/* x += mixer(norm(x)), x += FFN(norm(x)) for the n rows of the batch. */
void pass_layer(pass *p, const layer_weights *w, int layer, int is_full, int slot, int64_t n);
/* nll[i] = -ln p(targets[i]) after row i of x [n][H], which the last norm has seen; 0 where the
 * target is negative. */
void pass_score(pass *p, const float *x, int64_t n, const int32_t *targets, float *nll);

/* Of the rows of a span, which p->u holds after the last norm: what the score wants of what they
 * predict, and their sum. */
void pass_score_text(pass *p, const span *sp, const ses_score *score);
void pass_sum(const pass *p, const span *sp, double *sums);

/* y = mixer(u) or FFN(u) for the n rows of the batch; `slot` is the layer's among those of its
 * kind. See gdn.c, attn.c, ffn.c. */
void gdn_mix(pass *p, const gdn_weights *w, int slot, int64_t n);
void attn_mix(pass *p, const attn_weights *w, int slot, int64_t n);
void ffn_mix(pass *p, const layer_weights *w, int64_t n);

/* Sizes of what attention needs in the workspace. */
int64_t attn_work_bytes(const model *m);
int64_t attn_n_found(const model_config *c);

/* The position of row i into p->cos and p->sin. */
void rope_prepare(pass *p, int64_t i, int64_t pos);

/* y = W x for n rows of the batch; the same as one of several jobs. */
static inline kern_job pass_job(const num_matrix *w, const float *x, int64_t n, float *y)
{
    return (kern_job){.w = w, .x = x, .y = y, .ldx = w->cols, .n_x = n, .ldy = w->rows};
}
void pass_linear(pass *p, profile_op op, const num_matrix *w, const float *x, int64_t n, float *y);
/* Several products at once. */
void pass_linear_jobs(pass *p, profile_op op, kern_job *jobs, int64_t n_jobs);
/* out[t] = RMSNorm(x[t]) for n rows of width H; in place is fine. */
void pass_norm(pass *p, const float *x, const float *weight, int64_t n, float *out);
/* x[t] += y[t] for n rows of the residual stream. */
void pass_add(pass *p, int64_t n);

/* `op` has ended and moved so many bytes. */
static inline void pass_lap(pass *p, profile_op op, int64_t bytes)
{
    if (p->profile) profile_lap(p->profile, op, bytes);
}

static inline void pass_show(const pass *p, tap_site site, const float *x, int64_t n, int64_t cols,
                             const int32_t *first)
{
    if (!p->tap) return;
    tap_rows rows = {site, p->layer, x, n, cols, first};
    p->tap->look(p->tap->ctx, &rows);
}

#endif
