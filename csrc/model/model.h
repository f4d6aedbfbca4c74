/* model: an opened checkpoint, ready to run; and session: one mutable timeline on it.
 *
 * A model is immutable after model_open apart from its thread pool, which serves one call at a
 * time, the workspace and pages its sessions share, and the matrices that model/replace.h swaps;
 * sessions of one model must therefore be driven from one thread. Sessions borrow the model and
 * must be closed before it. Everything is allocated when a session opens; evaluating allocates
 * nothing.
 *
 * Shapes: H hidden size, V vocabulary, L layers, k experts used; all arrays are f32, row major. */
#ifndef MODEL_MODEL_H
#define MODEL_MODEL_H

#include <stdint.h>

#include "base/cancel.h"
#include "base/cpu.h"
#include "base/err.h"
#include "base/pool.h"
#include "io/st.h"
#include "kern/kern.h"
#include "model/config.h"
#include "model/profile.h"
#include "model/weights.h"

typedef enum kv_codec { KV_F32, KV_F16, KV_N_CODECS } kv_codec;

typedef struct model {
    model_config config;
    weights weights;
    st_set *files;
    json_doc *config_json;
    const kern_ops *ops;
    pool *pool;
    struct pass *pass;               /* workspace of all sessions; NULL before the first */
    struct kv_pool *kv[KV_N_CODECS]; /* pages of all sessions; NULL before the first of a codec */
    struct model_swap *swaps;        /* matrices that run in place of others: model/replace.h */
    int int8;                        /* as opened */
} model;

typedef struct model_options {
    int n_threads;   /* 0: all processors of the affinity mask */
    cpu_level level; /* ceiling; CPU_N_LEVELS - 1 takes what the machine has */
    int int8;        /* products with activations in 8 bits where kern_takes_int8; else all f32 */
} model_options;

/* dir: holds config.json and safetensors. NULL on failure. */
model *model_open(const char *dir, const model_options *options, err_info *e);
void model_close(model *m);

/* The config.json of a checkpoint directory; the caller's to close. NULL on failure. */
json_doc *model_read_config(const char *dir, err_info *e);

/* Looks at every weight (20 s for 19 GB on one core: for explaining, not for opening) and names the
 * first matrix that is not finite: ERR_FORMAT with its row and column. */
err_code model_check_finite(const model *m, err_info *e);

/* Pages of keys and values that sessions and snapshots hold, each counted once; of them, those that
 * only snapshots hold; and the bytes of one. 0 before the first session of the codec. */
int64_t model_kv_pages(const model *m, kv_codec codec, int64_t *n_kept, int64_t *page_bytes);

/* ---- sessions ------------------------------------------------------------------------------ */

const char *kv_codec_name(kv_codec codec);
int kv_codec_parse(const char *name); /* -1 if there is no such codec */

typedef struct ses ses;

/* Tokens per batch: enough that a decoded weight row serves many (of 256 experts of which 8 are
 * chosen each meets 16), little enough that scratch stays near 100 MB at 35B-A3B's sizes and that
 * a cancelled batch loses little. */
enum { SES_BATCH = 512 };

/* So many tokens end before anybody waits for it, and saving the states that cancelling them would
 * take costs a twentieth of two tokens' time. */
enum { SES_FEW_ROWS = 8 };

typedef struct ses_options {
    int64_t n_ctx; /* tokens it can hold; at least 1 */
    kv_codec codec;
} ses_options;

ses *ses_open(model *m, const ses_options *options, err_info *e);
void ses_close(ses *s);

/* What an evaluation should hand out besides the last logits. NULL members are not computed.
 * The caller owns the arrays, sized for the n tokens of that call. */
typedef struct ses_want {
    float *logits;          /* [n][V] */
    float *hidden;          /* [L+1][n][H] embeddings, then the residual stream after each layer */
    float *final;           /* [n][H] after the last norm */
    int32_t *router_ids;    /* [L][n][k] chosen experts, best first */
    float *router_weights;  /* [L][n][k] */
    const int32_t *targets; /* [n] for nll: the token to score after each one, < 0 for none */
    float *nll;             /* [n] -ln p(targets[i]) in nats, 0 where there is no target */
} ses_want;

/* Appends n tokens. A token's results are the same bits however the sequence is cut into calls
 * and whatever the number of threads. Fails without effect on ids out of range (ERR_RANGE) and
 * when the context is full (ERR_LIMIT); `cancel` is looked at all along the layers of more than
 * SES_FEW_ROWS tokens, before each piece of their loops; the batches of 512 tokens that were
 * complete stay (ERR_CANCELLED, ses_n_past tells). want may be NULL. */
err_code ses_eval(ses *s, const int32_t *ids, int64_t n, const ses_want *want,
                  const cancel_flag *cancel, err_info *e);

/* A text that is scored while a session takes it in, piece by piece from its beginning. Pieces fill
 * in what they are about; a batch that is cancelled leaves the sums alone. */
typedef struct ses_score {
    const int32_t *ids; /* [n] the whole text */
    int64_t n;
    int n_top;           /* how many of the likeliest tokens to list */
    float *logprobs;     /* [n] of each token by those before it, nothing at 0; NULL: not wanted */
    int32_t *ranks;      /* [n] of each token among all in its place, 1 is the likeliest */
    int32_t *top_ids;    /* [n][n_top] the likeliest in its place, best first; -1: no more */
    float *top_logprobs; /* [n][n_top] */
    double *sums;        /* [H] what the last norm puts out is added to it; NULL: not wanted */
} ses_score;

/* What one session takes in in a batch: n >= 1 tokens. */
typedef struct ses_part {
    ses *s;
    const int32_t *ids; /* [n] */
    int64_t n;
    const ses_score *score; /* NULL: only the last logits are wanted */
} ses_part;

/* Appends at most SES_BATCH tokens to several sessions of one model, each weight being read once:
 * decode steps of many, or of some while others read their prompts. Each session ends up with the
 * bits that ses_eval would give it. Fails without effect on any of them, naming the part; when
 * cancelled (looked at unless every part is one token or all are few), all are as they were. Scores
 * are the same however a text is cut into pieces. */
err_code ses_eval_parts(const ses_part *parts, int n_parts, const cancel_flag *cancel, err_info *e);

/* Whether ses_eval would take the n ids after the first `past` tokens; nothing changes. */
err_code ses_check(const ses *s, int64_t past, const int32_t *ids, int64_t n, err_info *e);

int64_t ses_n_past(const ses *s);
int64_t ses_n_ctx(const ses *s);
kv_codec ses_codec(const ses *s);
const int32_t *ses_ids(const ses *s); /* [n_past] */
/* Logits [V] after the last token; NULL before the first, and when the evaluation that should have
 * made them was cancelled. Borrowed; the next eval overwrites. */
float *ses_logits(ses *s);
void ses_reset(ses *s);
int64_t ses_kv_bytes(const ses *s);    /* in use: rows of past tokens, MTP included */
int64_t ses_state_bytes(const ses *s); /* recurrent and convolution state */

/* The timeline as it is: outlives changes to the session and the session, not the model. Keys and
 * values are shared until one side writes; the recurrent state and the logits are copied. */
typedef struct ses_snap ses_snap;
ses_snap *ses_snapshot(const ses *s, err_info *e);
err_code ses_restore(ses *s, const ses_snap *snap, err_info *e);
void ses_snap_close(ses_snap *snap);
int64_t ses_snap_n_past(const ses_snap *snap);

/* Counts from zero what later evaluations of the session do, or stops counting. A batch of several
 * sessions counts as a whole, for the first of them that is profiled. */
void ses_profile(ses *s, int on);
const profile *ses_profiled(const ses *s); /* counted so far; stays after the end */

/* Raw state for specs: the recurrent state [v_heads][v_dim][k_dim], the convolution rows
 * [conv_kernel-1][conv_width] (oldest first) of a linear layer, key and value rows
 * [kv_heads*head_dim] of a full layer, widened to f32. */
const float *ses_recurrent(const ses *s, int layer);
void ses_conv_rows(const ses *s, int layer, float *out);
void ses_kv_row(const ses *s, int layer, int64_t pos, float *key, float *value);

/* Multi-token prediction for rows first .. first+n-1. Row p takes final[p - first] (the trunk's
 * output [H] after its last norm, or the block's own hidden when drafting) and next_ids[p - first],
 * the token after p, and predicts the token after that. The block has its own KV cache: rows
 * before `first` must have been given, rows from there on are replaced. hidden [n][H] is after
 * mtp.norm, logits [n][V]; either may be NULL. ERR_UNSUPPORTED if the checkpoint has no block. */
err_code ses_mtp(ses *s, int64_t first, const float *final, const int32_t *next_ids, int64_t n,
                 float *hidden, float *logits, err_info *e);

#endif
