/* layers: a forward pass that takes all sequences through one layer before the next one.
 *
 * For measuring, not for generating: each layer's weights are read once, whatever the number of
 * tokens, and leave memory when it is done, so a checkpoint far larger than memory runs at the
 * speed of its file. Sequences are independent: each starts from an empty state. Results are the
 * bits of ses_eval.
 *
 * What it holds: 4 H bytes for each token of all sequences (the residual stream; where it lies in
 * a file, those of the sequence at hand are in memory), and one session as long as the longest
 * sequence. Not thread-safe; borrows the model, whose other sessions must
 * not be evaluated during a step. */
#ifndef MODEL_LAYERS_H
#define MODEL_LAYERS_H

#include "model/model.h"
#include "model/tap.h"

typedef struct layers layers;

typedef struct layers_options {
    kv_codec codec;
    const tap *tap;      /* borrowed; NULL for none */
    const char *scratch; /* directory for the residual stream; NULL keeps it in memory */
    /* Two files for it instead, so that another process can go on after a layer: NULL for none.
     * After n_layers > 0 layers they are there, and streams[kept] has what those left. */
    const char *const *streams;
    int64_t n_layers;
    int kept;
} layers_options;

/* Sequence i is ids[first[i]] .. ids[first[i+1]-1], at least one token; first[0] is 0. Copies the
 * ids. NULL on failure: ERR_RANGE for ids, ERR_LIMIT for a sequence that the model cannot hold. */
layers *layers_open(model *m, const int32_t *ids, const int64_t *first, int64_t n_sequences,
                    const layers_options *options, err_info *e);
void layers_close(layers *r);

/* Steps in all and those done. A step takes one sequence through one layer; those after the last
 * layer are the last norm. */
int64_t layers_n_steps(const layers *r);
int64_t layers_n_done(const layers *r);

/* The next step; nothing when all are done. `cancel` is looked at every SES_BATCH tokens; after
 * ERR_CANCELLED only closing is left, and further steps say so. */
err_code layers_step(layers *r, const cancel_flag *cancel, err_info *e);

/* Between layers: the stream as it is now is on the disk, and stays as it is until the next
 * layers_keep. ERR_RANGE within a layer, or without `streams`. *kept is the number of its file. */
err_code layers_keep(layers *r, int *kept, err_info *e);

/* The residual stream of all sequences, [n_tokens][H], borrowed: after L * n_sequences steps it is
 * what ses_want.hidden has at depth L >= 1, at the end ses_want.final, which makes logits. */
const float *layers_rows(const layers *r);

/* When all steps are done: -ln p(targets[i]) after row `row` + i into nll [n], 0 where the target
 * is negative. ERR_RANGE for targets beyond the vocabulary. */
err_code layers_score(layers *r, int64_t row, int64_t n, const int32_t *targets, float *nll,
                      err_info *e);

#endif
