/* lguard: arrays for kernels that are tried out. Internal to the lua room.
 *
 * Each is at the very end of a mapping that an inaccessible page follows, so that touching one byte
 * too many is a fault, and alignment is whatever the size makes it. It is owned by a userdata that
 * is left on the stack, and there as long as that. All raise where there is no memory. */
#ifndef LUA_LGUARD_H
#define LUA_LGUARD_H

#include "lua/lml.h"

/* Makes the userdata's class; before the others. */
void lguard_open(lua_State *L);

/* n bytes: zeros, or a copy. */
void *lguard_new(lua_State *L, size_t n);
void *lguard_copy(lua_State *L, const void *bytes, size_t n);

/* Of the table at 3: the bytes of [key], a string, as elements of `size`, and their number. Raises
 * when it is absent, unless n is NULL. */
void *lguard_array(lua_State *L, const char *key, size_t size, int64_t *n);
/* Likewise, n of f32. */
float *lguard_floats(lua_State *L, const char *key, int64_t n);

/* Unmaps what stands from `first` to `last` on the stack: the collector sees a few bytes where
 * there are pages, and would let mappings pile up to the system's limit. */
void lguard_free(lua_State *L, int first, int last);

#endif
