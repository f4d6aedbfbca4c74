/* moonlet.logits: a view of one row of logits, owned by a session or a tensor.
 *
 * Ids are the model's, 0-based. What changes a view changes what it is a view of. */
#include "lua/lml.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "sample/sample.h"

typedef struct logits {
    float *data; /* [n], borrowed from the user value */
    int64_t n;
    const uint64_t *epoch; /* lives in the user value too */
    uint64_t born;
} logits;

static const char CLASS[] = "moonlet.logits";

void lml_push_logits(lua_State *L, float *data, int64_t n, const uint64_t *epoch, int owner)
{
    owner = lua_absindex(L, owner);
    uint64_t born = *epoch; /* before anything that may run a finalizer */
    logits *v = lua_newuserdatauv(L, sizeof *v, 1);
    *v = (logits){data, n, epoch, born};
    lua_pushvalue(L, owner);
    lua_setiuservalue(L, -2, 1);
    luaL_setmetatable(L, CLASS);
}

static logits *check(lua_State *L, int arg)
{
    logits *v = luaL_checkudata(L, arg, CLASS);
    if (*v->epoch != v->born) luaL_error(L, "stale logits: what they were a view of has moved on");
    return v;
}

float *lml_check_logits(lua_State *L, int arg, int64_t *n)
{
    logits *v = check(L, arg);
    *n = v->n;
    return v->data;
}

static int64_t check_id(lua_State *L, int arg, int64_t n)
{
    lua_Integer id = luaL_checkinteger(L, arg);
    if (id < 0 || id >= n)
        luaL_argerror(L, arg, lua_pushfstring(L, "id %I is not in 0..%I", id, (lua_Integer)n - 1));
    return id;
}

static int logits_n(lua_State *L)
{
    lua_pushinteger(L, check(L, 1)->n);
    return 1;
}

static int logits_get(lua_State *L)
{
    logits *v = check(L, 1);
    lua_pushnumber(L, v->data[check_id(L, 2, v->n)]);
    return 1;
}

static int logits_argmax(lua_State *L)
{
    logits *v = check(L, 1);
    err_info e;
    int32_t id;
    if (sample_argmax(lml_row_ops(L), v->data, v->n, &id, &e)) return lml_fail(L, &e);
    lua_pushinteger(L, id);
    return 1;
}

static int logits_topk(lua_State *L)
{
    logits *v = check(L, 1);
    lua_Integer k = luaL_checkinteger(L, 2);
    luaL_argcheck(L, k >= 1, 2, "at least 1 expected");
    if (k > v->n) k = v->n;
    err_info e;
    int64_t n;
    cand *list = lua_newuserdatauv(L, (size_t)k * sizeof *list, 0);
    v = check(L, 1);
    if (sample_topk(lml_row_ops(L), v->data, v->n, k, list, &n, &e)) return lml_fail(L, &e);
    lua_createtable(L, (int)n, 0);
    lua_createtable(L, (int)n, 0);
    for (int64_t i = 0; i < n; i++) {
        lua_pushinteger(L, list[i].id);
        lua_rawseti(L, -3, i + 1);
        lua_pushnumber(L, list[i].logit);
        lua_rawseti(L, -2, i + 1);
    }
    return 2;
}

static int logits_logprob(lua_State *L)
{
    logits *v = check(L, 1);
    int32_t id = (int32_t)check_id(L, 2, v->n);
    err_info e;
    double logprob;
    if (sample_logprob(lml_row_ops(L), v->data, v->n, id, &logprob, &e)) return lml_fail(L, &e);
    lua_pushnumber(L, logprob);
    return 1;
}

static int logits_entropy(lua_State *L)
{
    logits *v = check(L, 1);
    err_info e;
    double entropy;
    if (sample_entropy(lml_row_ops(L), v->data, v->n, &entropy, &e)) return lml_fail(L, &e);
    lua_pushnumber(L, entropy);
    return 1;
}

static int logits_scale(lua_State *L)
{
    logits *v = check(L, 1);
    double factor = luaL_checknumber(L, 2);
    luaL_argcheck(L, factor > 0 && factor < INFINITY, 2, "positive factor expected");
    for (int64_t i = 0; i < v->n; i++) v->data[i] = (float)(v->data[i] * factor);
    lua_settop(L, 1);
    return 1;
}

/* Two passes: nothing is changed when an entry is wrong. */
static int logits_bias(lua_State *L)
{
    logits *v = check(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    for (int apply = 0; apply < 2; apply++) {
        lua_pushnil(L);
        while (lua_next(L, 2)) {
            lua_Integer id = lua_isinteger(L, -2) ? lua_tointeger(L, -2) : -1;
            int ok;
            double x = lua_tonumberx(L, -1, &ok);
            if (id < 0 || id >= v->n) {
                luaL_tolstring(L, -2, NULL);
                luaL_error(L, "bias: %s is not an id in 0..%I", lua_tostring(L, -1),
                           (lua_Integer)v->n - 1);
            }
            if (!ok || !(x < INFINITY))
                luaL_error(L, "bias of id %I is not a number below inf", id);
            if (apply) v->data[id] = (float)(v->data[id] + x);
            lua_pop(L, 1);
        }
    }
    lua_settop(L, 1);
    return 1;
}

/* One byte for each id of the view at 1, 1 where the array at `arg` names it; left on the stack. */
static const char *push_flags(lua_State *L, int arg)
{
    int64_t n = check(L, 1)->n, n_ids;
    const int32_t *ids = lml_check_ids(L, arg, &n_ids);
    char *flags = lua_newuserdatauv(L, (size_t)n + 1, 0);
    memset(flags, 0, (size_t)n);
    for (int64_t i = 0; i < n_ids; i++) {
        if (ids[i] < 0 || ids[i] >= n)
            luaL_argerror(
                L, arg,
                lua_pushfstring(L, "id %d is not in 0..%I", (int)ids[i], (lua_Integer)n - 1));
        flags[ids[i]] = 1;
    }
    return flags;
}

/* mask(ids) or mask(bits): only these stay. bits: a string, id = bit id % 8 of byte id / 8 + 1;
 * what lies behind its end is ruled out. */
static int logits_mask(lua_State *L)
{
    if (lua_type(L, 2) == LUA_TSTRING) {
        size_t n_bytes;
        logits *v = check(L, 1);
        const char *bits = lua_tolstring(L, 2, &n_bytes);
        for (int64_t i = 0; i < v->n; i++)
            if ((uint64_t)i / 8 >= n_bytes || !(bits[i / 8] >> (i % 8) & 1)) v->data[i] = -INFINITY;
    } else {
        const char *flags = push_flags(L, 2);
        logits *v = check(L, 1);
        for (int64_t i = 0; i < v->n; i++)
            if (!flags[i]) v->data[i] = -INFINITY;
    }
    lua_settop(L, 1);
    return 1;
}

/* ban(ids), or ban(first, last) with both ends included */
static int logits_ban(lua_State *L)
{
    if (lua_isinteger(L, 2)) {
        logits *v = check(L, 1);
        int64_t first = check_id(L, 2, v->n);
        int64_t last = lua_isnoneornil(L, 3) ? first : check_id(L, 3, v->n);
        for (int64_t i = first; i <= last; i++) v->data[i] = -INFINITY;
    } else {
        const char *flags = push_flags(L, 2);
        logits *v = check(L, 1);
        for (int64_t i = 0; i < v->n; i++)
            if (flags[i]) v->data[i] = -INFINITY;
    }
    lua_settop(L, 1);
    return 1;
}

static int logits_gc(lua_State *L)
{
    luaL_checkudata(L, 1, CLASS);
    return 0;
}

void lml_open_logits(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"argmax", logits_argmax},   {"ban", logits_ban}, {"bias", logits_bias},
        {"entropy", logits_entropy}, {"get", logits_get}, {"logprob", logits_logprob},
        {"mask", logits_mask},       {"n", logits_n},     {"scale", logits_scale},
        {"topk", logits_topk},       {NULL, NULL},
    };
    lml_class(L, CLASS, methods, logits_gc);
    luaL_getmetatable(L, CLASS);
    lua_pushcfunction(L, logits_n);
    lua_setfield(L, -2, "__len");
    lua_pop(L, 1);
}
