/* replace: a model that runs with some of its matrices swapped for copies, to see what they do.
 *
 * The checkpoint is not touched. A copy belongs to the model and lives until it is replaced again,
 * restored or the model is closed. Sessions stay open across a swap; what they computed before it
 * stays as it was. Not while another call runs on the model.
 *
 * Names are those of weights_each, and without the expert's number for a whole stack:
 * "layers.3.mlp.experts.7.gate_proj", "layers.3.mlp.experts.gate_proj". Where embeddings are tied,
 * "embed_tokens" is the head too. */
#ifndef MODEL_REPLACE_H
#define MODEL_REPLACE_H

#include "model/model.h"
#include "num/fit.h"

/* Puts a copy of `with` in the place of the one matrix `name`: any mode, the same shape. ERR_RANGE
 * if there is no such matrix or the shape is another. */
err_code model_replace(model *m, const char *name, const num_matrix *with, err_info *e);

typedef struct model_encoding {
    num_format format; /* group 0: the whole row */
    num_fit fit;
    const float *importance; /* [cols] mean squares of the inputs, or that of each matrix of the
                                stack, one behind the other; NULL: all columns count the same */
    int64_t n_importance;    /* floats */
} model_encoding;

/* Encodes `name`, or each matrix of a stack, from the checkpoint's weights (not from an earlier
 * copy) and runs with that. *n_bytes: of the copies, scales and biases included. A weight without
 * encoding is ERR_FORMAT naming matrix, row and column, and nothing has changed then. */
err_code model_encode(model *m, const char *name, const model_encoding *encoding,
                      const cancel_flag *cancel, int64_t *n_bytes, err_info *e);

/* Back to the checkpoint's weights: of one name, or of all when it is NULL. ERR_RANGE if there is
 * no such matrix; that it was not replaced is fine. */
err_code model_restore(model *m, const char *name, err_info *e);

/* A matrix of the model as the checkpoint has it. */
const num_matrix *model_stored(const model *m, const num_matrix *at);

#endif
