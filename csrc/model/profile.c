#include "model/profile.h"

#include "base/clock.h"

const char *profile_op_name(profile_op op)
{
    static const char *const names[PROFILE_N_OPS] = {
        [PROFILE_EMBED] = "embed",     [PROFILE_SAVE] = "save",
        [PROFILE_NORM] = "norm",       [PROFILE_QKV_PROJ] = "qkv_proj",
        [PROFILE_ATTEND] = "attend",   [PROFILE_O_PROJ] = "o_proj",
        [PROFILE_IN_PROJ] = "in_proj", [PROFILE_CONV] = "conv",
        [PROFILE_DELTA] = "delta",     [PROFILE_OUT_PROJ] = "out_proj",
        [PROFILE_ROUTER] = "router",   [PROFILE_DISPATCH] = "dispatch",
        [PROFILE_GATE_UP] = "gate_up", [PROFILE_DOWN] = "down",
        [PROFILE_COMBINE] = "combine", [PROFILE_LM_HEAD] = "lm_head",
        [PROFILE_MTP_FC] = "mtp_fc",   [PROFILE_OTHER] = "other",
    };
    return names[op];
}

void profile_begin(profile *f, int64_t n_tokens)
{
    f->n_batches++;
    f->n_tokens += n_tokens;
    f->lap = clock_seconds();
}

void profile_lap(profile *f, profile_op op, int64_t bytes)
{
    double now = clock_seconds();
    profile_row *row = &f->rows[op];
    row->calls++;
    row->bytes += bytes;
    row->seconds += now - f->lap;
    f->lap = now;
}
