/* lmodel: what the model and session bindings share. Internal to the lua room.
 *
 * A session keeps its model's userdata alive through a user value. Closing the model first is
 * allowed: its memory goes when the last session closes, but nothing can be computed any more. */
#ifndef LUA_LMODEL_H
#define LUA_LMODEL_H

#include "lua/lml.h"
#include "model/model.h"

#define LMODEL_CLASS   "moonlet.core.model"
#define LSESSION_CLASS "moonlet.core.session"
#define LSNAP_CLASS    "moonlet.core.snapshot"

struct worker;
struct job_box;

typedef struct model_box {
    model *m; /* NULL once freed */
    int closed;
    int n_sessions;
    struct worker *worker; /* runs jobs; NULL before the first */
    struct job_box *job;   /* that is running, or NULL */
} model_box;

/* Raises when the model is closed or computing in the background. */
void lmodel_check_box(lua_State *L, const model_box *box);
/* The model at `arg`, checked so. */
model_box *lmodel_check(lua_State *L, int arg);

/* One session less; frees a closed model that has no more. */
void lmodel_release(model_box *box);

/* model:session{ctx=, kv=} -> session; in lsession.c. */
int lsession_new(lua_State *L);
/* model:eval_parts{{session=, ids=, score=}, ...} -> true; in lsession.c. See ses_eval_parts. */
int lsession_eval_parts(lua_State *L);

/* The parts in the table at `arg`, all sessions of one model, with everything they borrow in a
 * table left on the stack: {ids of the first, its session, its score or nil, ids of the second,
 * ...}. The parts themselves come behind them, and then there is room for one more. */
ses_part *lsession_check_parts(lua_State *L, int arg, const model_box *owner, int *n_parts);

/* model:scoring(ids, options) -> score; in lscore.c. */
int lscore_new(lua_State *L);
/* The score at `arg` for sessions of a model, borrowed. */
const ses_score *lscore_check(lua_State *L, int arg, const model_box *owner);
void lscore_open(lua_State *L);

/* model:start_parts(parts) -> job; in ljob.c. */
int ljob_start(lua_State *L);
/* Cancels the running job, if there is one, and waits for its end. */
void ljob_end(model_box *box);
void ljob_open(lua_State *L);
void lsession_open(lua_State *L);

/* model:calibrate(sequences, options) -> calibration; in lcalib.c. */
int lcalib_new(lua_State *L);
void lcalib_open(lua_State *L);

/* model:layers(sequences, options) -> layers; in llayers.c. */
int llayers_new(lua_State *L);
void llayers_open(lua_State *L);

#endif
