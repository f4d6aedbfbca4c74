/* lml: what every binding file shares: check, call, push.
 *
 * Handles are userdata created closed, then opened, so that a failure in between frees nothing
 * twice; __gc and __close are the same idempotent function. Failures of the world return
 * nil, message, code; misuse raises. Option tables are checked: an unknown key raises.
 *
 * Tables are read raw: what they hold stays alive in them, and no metamethod runs between a check
 * and what rests on it. Finalizers still do wherever Lua allocates, and may close any handle, so a
 * binding checks its handle once its arguments are read. */
#ifndef LUA_LML_H
#define LUA_LML_H

#include <lauxlib.h>
#include <lua.h>
#include <stdint.h>

#include "base/cpu.h"
#include "base/err.h"
#include "base/cancel.h"
#include "base/process.h"
#include "num/fit.h"

/* nil, text, code name; returns 3. */
int lml_fail(lua_State *L, const err_info *e);

/* Registers a class: metatable `name` with methods as __index, and gc as __gc and __close. */
void lml_class(lua_State *L, const char *name, const luaL_Reg *methods, lua_CFunction gc);

/* Raises unless every key of the table at `arg` is in the NULL-ended list. nil is fine. */
void lml_check_keys(lua_State *L, int arg, const char *const *keys);

/* Pushes table[key] and returns its type. */
int lml_get(lua_State *L, int table, const char *key);

/* The length of a table; raises above `max`, which sparse tables exceed without using memory. */
lua_Integer lml_len(lua_State *L, int table, int max);

/* Fields of an option table at `arg` (may be nil or none). */
lua_Integer lml_opt_int(lua_State *L, int arg, const char *key, lua_Integer fallback);
lua_Number lml_opt_number(lua_State *L, int arg, const char *key, lua_Number fallback);
int lml_opt_bool(lua_State *L, int arg, const char *key, int fallback);
const char *lml_opt_string(lua_State *L, int arg, const char *key, const char *fallback);

/* A Lua array of integers as int32 in a new userdata left on the stack; raises on other content. */
const int32_t *lml_check_ids(lua_State *L, int arg, int64_t *n);
void lml_push_ids(lua_State *L, const int32_t *ids, int64_t n);

/* What a list of class moonlet.ids at `arg` holds, borrowed until it is added to; NULL for anything
 * else. */
const int32_t *lml_to_ids(lua_State *L, int arg, size_t *n);
/* A new one, with a copy of n ids. */
void lml_push_id_list(lua_State *L, const int32_t *ids, size_t n);

/* A Lua array of such arrays, one after the other: sequence i is ids[first[i]] ..
 * ids[first[i+1]-1]. Two new userdata are left on the stack, first below ids. */
const int32_t *lml_check_sequences(lua_State *L, int arg, int64_t **first, int64_t *n_sequences);

/* Pushes a tensor (class moonlet.tensor, owns zeroed memory, closes with it) and returns its
 * data; dtype 'f' for f32, 'i' for int32. Raises when memory runs out. */
void *lml_push_tensor(lua_State *L, char dtype, int n_dims, const int64_t *shape);

/* The f32 numbers of a tensor of two dimensions at `arg`, borrowed; raises on any other. */
const float *lml_check_rows(lua_State *L, int arg, int64_t *rows, int64_t *cols);

/* Pushes a view of n logits (class moonlet.logits). The object at `owner` is kept alive; once
 * *epoch differs from what it is now, every use of the view raises "stale logits". */
void lml_push_logits(lua_State *L, float *data, int64_t n, const uint64_t *epoch, int owner);

/* The numbers behind a view, borrowed; raises when it is stale. */
float *lml_check_logits(lua_State *L, int arg, int64_t *n);

/* The floats in a string of n_bytes, which the caller keeps alive; where it is not aligned for
 * them, a copy is left on the stack. */
const float *lml_floats(lua_State *L, const char *bytes, size_t n_bytes);

struct num_matrix;
struct st_entry;

/* {name=, dtype=, shape=} at `arg`, which keeps the name alive; i: its number, for messages. */
void lml_check_entry(lua_State *L, int arg, lua_Integer i, struct st_entry *t);

/* A matrix described by the table at `arg`, all sizes checked against its byte strings: mode,
 * rows, cols, group, codes, and by mode scales, biases, bits, tile_rows, row_bytes, divisor,
 * scale_dtype and bias_dtype ("f32", "f16", "bf16"). The table keeps the bytes alive. */
void lml_check_matrix(lua_State *L, int arg, struct num_matrix *m);

/* The instruction set that the environment variable MOONLET_CPU names, or the best there is: what
 * goes into model_options. Raises on an unknown name. */
cpu_level lml_cpu_level(lua_State *L);

/* The level of the kernels of that name; raises when there are none here. */
cpu_level lml_kernels_level(lua_State *L, const char *name);

struct kern_row_ops;

/* What samplers look at logits with: of the level of lml_cpu_level, asked for once. */
const struct kern_row_ops *lml_row_ops(lua_State *L);

/* The next number in [0, 1) of a generator (class moonlet.rng). */
double lml_rng_uniform(lua_State *L, int arg);

/* A number format from the fields mode, bits, group, flavour, mx_rule and global_scale of an option
 * table; whether it exists is for num_format_check to say. */
num_format lml_check_format(lua_State *L, int arg);

/* Field fit of an option table: minmax (also without the field), mse, imatrix (mse for which there
 * has to be an importance: *imatrix is 1), qstream or qstream-amax. */
num_fit lml_check_fit(lua_State *L, int arg, int *imatrix);

/* Raises unless h[n], the option or field importance, can be mean squares: the searches of
 * num/fit.h rely on it. */
void lml_check_importance(lua_State *L, const float *h, int64_t n);

/* Raised by Ctrl-C once moonlet.core.catch_interrupt() was called; NULL-safe to pass around. */
cancel_flag *lml_cancel_flag(void);

/* Programs that run: a second Ctrl-C ends them with this process. */
process_list *lml_programs(void);

/* Each adds its functions and classes to the core table on top of the stack. */
void lml_open_awq(lua_State *L);
void lml_open_base(lua_State *L);
void lml_open_blas(lua_State *L);
void lml_open_cands(lua_State *L);
void lml_open_file(lua_State *L);
void lml_open_ids(lua_State *L);
void lml_open_imatrix(lua_State *L);
void lml_open_journal(lua_State *L);
void lml_open_json(lua_State *L);
void lml_open_kern(lua_State *L);
void lml_open_kld(lua_State *L);
void lml_open_layout(lua_State *L);
void lml_open_logits(lua_State *L);
void lml_open_model(lua_State *L);
void lml_open_net(lua_State *L);
void lml_open_num(lua_State *L);
void lml_open_process(lua_State *L);
void lml_open_quant(lua_State *L);
void lml_open_rng(lua_State *L);
void lml_open_sandbox(lua_State *L);
void lml_open_st(lua_State *L);
void lml_open_sys(lua_State *L);
void lml_open_tensor(lua_State *L);
void lml_open_tok(lua_State *L);
void lml_open_turn(lua_State *L);
void lml_open_watch(lua_State *L);

#endif
