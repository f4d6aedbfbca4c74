/* kld: how far the predictions of one model (q) are from those of a reference (p).
 *
 * Positions are given by what a model's last norm puts out for them ("final", [n][H] f32), so that
 * logits exist for KLD_ROWS positions at a time however large the vocabulary. The reference is a
 * model or a file of its log-probabilities.
 *
 * KL(p || q) = sum p ln(p/q), in nats, over the whole vocabulary; sums run in double, one thread
 * to a position. Two equal rows give exactly 0. */
#ifndef MODEL_KLD_H
#define MODEL_KLD_H

#include "io/st.h"
#include "model/model.h"

enum { KLD_ROWS = 32 };

/* ---- a reference in a file ------------------------------------------------------------------
 *
 * Safetensors. A row holds codes c with ln p = -c * step, where step is the row's smallest ln p
 * over 65535: an even grid, because what an error e does to KL is p e^2 / 2 however improbable the
 * token. With steps of 4e-4 to 8e-4 (25 to 50 nats) that is 1e-8 nats on average, a hundredth of
 * what f16 makes of it in the same bytes. What is not about all tokens is kept exactly.
 *
 *   logprobs U16 [n, V] · step F32 [n] · top I32 [n] the best token · nll F32 [n] of the target
 *   ids I32 [T] · targets I32 [T], < 0 where nothing is scored · lengths I32 [sequences]
 *   __metadata__: format "moonlet reference", model, words */

typedef struct kld_file {
    st_set *set;
    int64_t n, vocab; /* positions, tokens */
    const st_tensor *logprobs, *step, *top, *nll, *ids, *targets, *lengths;
} kld_file;

/* ERR_FORMAT for a file that is none of ours, naming what is wrong. On failure *f is closed. */
err_code kld_file_open(kld_file *f, const char *path, err_info *e);
void kld_file_close(kld_file *f);

typedef struct kld_writer kld_writer;

typedef struct kld_texts { /* what was read: sequences of ids, one after the other */
    const int32_t *ids, *targets, *lengths;
    int64_t n_ids, n_sequences;
} kld_texts;

/* The file appears at `path` when kld_writer_finish succeeds. Copies what it needs. */
kld_writer *kld_writer_open(const char *path, int64_t vocab, const kld_texts *texts,
                            const char *model_name, const char *words, err_info *e);
/* Appends n positions: final [n][H] of m, which predict targets [n]. */
err_code kld_writer_put(kld_writer *w, model *m, const float *final, const int32_t *targets,
                        int64_t n, const cancel_flag *cancel, err_info *e);
err_code kld_writer_finish(kld_writer *w, err_info *e); /* frees w, also on failure */
void kld_writer_abort(kld_writer *w);

/* Adds to *error the squares of q - p, and to *power those of p, of n floats: residual streams of
 * two models, or of one with and without something. */
void kld_difference(const float *p, const float *q, int64_t n, double *error, double *power);

/* ---- comparing ------------------------------------------------------------------------------ */

typedef struct kld_reference {
    model *m; /* either a model and its rows; q itself stands for q without its replacements */
    const float *final;
    const kld_file *file; /* or a file's rows from `first` on */
    int64_t first;
} kld_reference;

typedef struct kld_result { /* arrays [n] of the caller */
    float *kl;              /* KL(p || q) */
    float *nll_p, *nll_q;   /* -ln p and -ln q of the target */
    int32_t *top_p, *top_q; /* the best token, the first of equals */
} kld_result;

/* ERR_FORMAT for damaged rows of a file; ERR_RANGE when vocabularies differ, a row is not in the
 * file, a target is no token or logits are not finite. */
err_code kld_compare(const kld_reference *p, model *q, const float *final, const int32_t *targets,
                     int64_t n, const kld_result *out, const cancel_flag *cancel, err_info *e);

#endif
