/* llayout: what a checkpoint holds, as a Lua table. Internal to the lua room. */
#ifndef LUA_LLAYOUT_H
#define LUA_LLAYOUT_H

#include "lua/lml.h"
#include "model/weights.h"

/* Pushes {family, tied, mtp, n_parameters, n_ignored, n_tensors, bytes_by_mode, config}. */
void llayout_push(lua_State *L, const model_config *c, const weights *w, const st_set *set);

#endif
