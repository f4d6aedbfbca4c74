/* Statistics of activations. */
#include "lua/lmodel.h"

#include <string.h>

#include "quant/calib.h"

#define CLASS "moonlet.core.calibration"

typedef struct calib_box {
    calib *c; /* NULL when closed */
    model_box *owner;
} calib_box;

static calib_box *check_calib(lua_State *L)
{
    calib_box *box = luaL_checkudata(L, 1, CLASS);
    if (!box->c) luaL_error(L, "closed calibration");
    lmodel_check_box(L, box->owner);
    return box;
}

static int close_calib(lua_State *L)
{
    calib_box *box = luaL_checkudata(L, 1, CLASS);
    if (box->c) {
        ljob_end(box->owner); /* it and this share the cache's pages */
        calib_close(box->c);
        box->c = NULL;
        lmodel_release(box->owner);
    }
    return 0;
}

/* options.meta = {key, value, ...} as a NULL-ended array in a new userdata left on the stack; the
 * table keeps the strings alive. */
static const char *const *check_meta(lua_State *L, int arg)
{
    int type = lua_isnoneornil(L, arg) ? LUA_TNIL : lml_get(L, arg, "meta");
    if (type != LUA_TNIL && type != LUA_TTABLE) luaL_error(L, "option 'meta': table expected");
    int at = lua_gettop(L);
    lua_Integer n = type == LUA_TNIL ? 0 : lml_len(L, at, 1024);
    const char **list = lua_newuserdatauv(L, (size_t)(n + 1) * sizeof *list, 0);
    for (lua_Integer i = 0; i < n; i++) {
        if (lua_rawgeti(L, at, i + 1) != LUA_TSTRING)
            luaL_error(L, "option 'meta': strings expected");
        list[i] = lua_tostring(L, -1);
        lua_pop(L, 1);
    }
    list[n - n % 2] = NULL;
    return list;
}

/* model:calibrate(sequences [, {dir=, layers=, kept=, hessians=, written=, hessian_cols=,
 *                               meta={key, value, ...}}]) */
int lcalib_new(lua_State *L)
{
    static const char *const keys[] = {"dir",     "layers",       "kept", "hessians",
                                       "written", "hessian_cols", "meta", NULL};
    lua_settop(L, 3);
    lml_check_keys(L, 3, keys);
    calib_options options = {.dir = lml_opt_string(L, 3, "dir", NULL),
                             .n_layers = lml_opt_int(L, 3, "layers", 0),
                             .kept = (int)lml_opt_int(L, 3, "kept", 0),
                             .is_written = lml_opt_bool(L, 3, "written", 0),
                             .hessians = lml_opt_string(L, 3, "hessians", NULL),
                             .hessian_cols = lml_opt_int(L, 3, "hessian_cols", INT32_MAX),
                             .meta = check_meta(L, 3)};
    int64_t *first, n;
    const int32_t *ids = lml_check_sequences(L, 2, &first, &n);

    calib_box *box = lua_newuserdatauv(L, sizeof *box, 1);
    model_box *owner = lmodel_check(L, 1);
    *box = (calib_box){.owner = owner};
    luaL_setmetatable(L, CLASS);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    err_info e;
    box->c = calib_open(owner->m, ids, first, n, &options, &e);
    if (!box->c) return lml_fail(L, &e);
    owner->n_sessions++;
    return 1;
}

/* calibration:step() -> steps done, steps in all */
static int step(lua_State *L)
{
    calib *c = check_calib(L)->c;
    err_info e;
    if (calib_step(c, lml_cancel_flag(), &e)) return lml_fail(L, &e);
    lua_pushinteger(L, calib_n_done(c));
    lua_pushinteger(L, calib_n_steps(c));
    return 2;
}

/* calibration:keep() -> layers, kept: what the next process has to be told */
static int keep(lua_State *L)
{
    calib *c = check_calib(L)->c;
    err_info e;
    int kept;
    if (calib_keep(c, &kept, &e)) return lml_fail(L, &e);
    lua_pushinteger(L, calib_n_layers(c));
    lua_pushinteger(L, kept);
    return 2;
}

/* calibration:finish() -> true: the file of Hessians is in its place */
static int finish(lua_State *L)
{
    calib *c = check_calib(L)->c;
    err_info e;
    if (calib_n_done(c) != calib_n_steps(c)) return luaL_error(L, "steps are left to do");
    if (calib_finish(c, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* Site i from 1. Asked for again after whatever may run a finalizer, which may close anything. */
static const calib_site *check_site(lua_State *L, lua_Integer i)
{
    const calib *c = check_calib(L)->c;
    if (i < 1 || i > calib_n_sites(c)) luaL_error(L, "no such site");
    return calib_site_at(c, i - 1);
}

/* calibration:sites() -> { {name=, n_in=, n_mat=, hessian=inputs of each or false}, ... } */
static int sites(lua_State *L)
{
    lua_Integer n = calib_n_sites(check_calib(L)->c);
    lua_createtable(L, (int)n, 0);
    for (lua_Integer i = 1; i <= n; i++) {
        lua_createtable(L, 0, 4);
        lua_pushstring(L, check_site(L, i)->name);
        lua_setfield(L, -2, "name");
        lua_pushinteger(L, check_site(L, i)->cols);
        lua_setfield(L, -2, "n_in");
        lua_pushinteger(L, check_site(L, i)->n_mat);
        lua_setfield(L, -2, "n_mat");
        lua_Integer side = check_site(L, i)->side;
        if (side)
            lua_pushinteger(L, side);
        else
            lua_pushboolean(L, 0);
        lua_setfield(L, -2, "hessian");
        lua_rawseti(L, -2, i);
    }
    return 1;
}

/* calibration:sums(i) -> sums2 [n_mat][n_in], sums [n_mat][n_in], counts [n_mat] of site i, as
 * bytes of f32 */
static int sums(lua_State *L)
{
    lua_Integer i = luaL_checkinteger(L, 2);
    const calib_site *s = check_site(L, i);
    int64_t n_mat = s->n_mat;
    size_t n_bytes = (size_t)(n_mat * s->cols) * sizeof(float);
    lua_pushlstring(L, (const char *)s->sums2, n_bytes);
    lua_pushlstring(L, (const char *)check_site(L, i)->sums, n_bytes);
    luaL_Buffer b;
    float *counts = (float *)(void *)luaL_buffinitsize(L, &b, (size_t)n_mat * sizeof *counts);
    const int64_t *from = check_site(L, i)->counts;
    for (int64_t k = 0; k < n_mat; k++) counts[k] = (float)from[k];
    luaL_pushresultsize(&b, (size_t)n_mat * sizeof *counts);
    return 3;
}

void lcalib_open(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"close", close_calib}, {"finish", finish}, {"keep", keep}, {"sites", sites},
        {"step", step},         {"sums", sums},     {NULL, NULL}};
    lml_class(L, CLASS, methods, close_calib);
}
