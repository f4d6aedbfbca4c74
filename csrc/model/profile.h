/* profile: where the time of a session's evaluations goes, operation by operation.
 *
 * An operation's time runs from the end of the one before it in the batch to its own end, so that
 * the times add up to the whole; what prepares its input (residual sums, SiLU, packing) is in it.
 * Its bytes are those that it cannot avoid moving: every matrix read once per batch, those of a
 * dense FFN once for each FFN_ROWS of its tokens, the recurrent state read and written once, cached
 * keys and values read up to the last position. */
#ifndef MODEL_PROFILE_H
#define MODEL_PROFILE_H

#include <stdint.h>

/* In the order of the forward pass. */
typedef enum profile_op {
    PROFILE_EMBED,    /* and the batch's preparation */
    PROFILE_SAVE,     /* the state put aside, so that a batch can be cancelled */
    PROFILE_NORM,     /* RMS norms of the residual stream, and the sums into it */
    PROFILE_QKV_PROJ, /* gated attention */
    PROFILE_ATTEND,
    PROFILE_O_PROJ,
    PROFILE_IN_PROJ, /* Gated DeltaNet */
    PROFILE_CONV,
    PROFILE_DELTA,
    PROFILE_OUT_PROJ,
    PROFILE_ROUTER, /* mixture of experts */
    PROFILE_DISPATCH,
    PROFILE_GATE_UP, /* dense, or experts and shared expert */
    PROFILE_DOWN,
    PROFILE_COMBINE,
    PROFILE_LM_HEAD,
    PROFILE_MTP_FC,
    PROFILE_OTHER, /* results copied and scored */
    PROFILE_N_OPS
} profile_op;

typedef struct profile_row {
    int64_t calls, bytes;
    double seconds;
} profile_row;

typedef struct profile {
    int64_t n_batches, n_tokens;
    double lap; /* when the last operation ended */
    profile_row rows[PROFILE_N_OPS];
} profile;

/* "embed", "in_proj", ... */
const char *profile_op_name(profile_op op);

void profile_begin(profile *f, int64_t n_tokens);
void profile_lap(profile *f, profile_op op, int64_t bytes);

#endif
