/* moonlet.candidates: the tokens still in the running, as sampler stages see them.
 *
 * Positions are 1-based and best first; ids are the model's, 0-based. The object is filled by
 * load and good until release; the policy does both, so that a stage which keeps its argument
 * gets an error later and not another step's candidates. */
#include "lua/lml.h"

#include <math.h>
#include <string.h>

#include "sample/cand.h"

enum { RNG_SLOT = 1, SCRATCH_SLOT = 2 }; /* user values */

/* Numbers that scripts put into logits stay this small, so that no stage's arithmetic overflows. */
#define LOGIT_MAX 1e100

typedef struct box {
    cands c;
    int loaded;
} box;

static const char CLASS[] = "moonlet.candidates";

static cands *check(lua_State *L)
{
    box *b = luaL_checkudata(L, 1, CLASS);
    if (!b->loaded) luaL_error(L, "candidates are only valid during the sampling call");
    return &b->c;
}

static int64_t check_position(lua_State *L, const cands *c)
{
    lua_Integer i = luaL_checkinteger(L, 2);
    if (i < 1 || i > c->n)
        luaL_argerror(L, 2,
                      lua_pushfstring(L, "position %I is not in 1..%I", i, (lua_Integer)c->n));
    return i - 1;
}

/* A number of [lo, hi]; NaN is in no range. */
static double check_range(lua_State *L, int arg, double lo, double hi)
{
    double x = luaL_checknumber(L, arg);
    if (!(x >= lo && x <= hi))
        luaL_argerror(L, arg, lua_pushfstring(L, "%f is not in [%f, %f]", x, lo, hi));
    return x;
}

/* ---- life cycle -------------------------------------------------------------------------- */

static int cands_new(lua_State *L)
{
    box *b = lua_newuserdatauv(L, sizeof *b, 2);
    *b = (box){0};
    luaL_setmetatable(L, CLASS);
    return 1;
}

static int cands_gc(lua_State *L)
{
    box *b = luaL_checkudata(L, 1, CLASS);
    b->loaded = 0;
    cands_close(&b->c);
    return 0;
}

/* c:load(logits, rng, n_vocab): ids from n_vocab on are left out (padded rows of the matrix). */
static int l_load(lua_State *L)
{
    box *b = luaL_checkudata(L, 1, CLASS);
    int64_t n;
    const float *logits = lml_check_logits(L, 2, &n);
    luaL_checkudata(L, 3, "moonlet.rng");
    lua_Integer n_vocab = luaL_optinteger(L, 4, n);
    luaL_argcheck(L, n_vocab >= 0, 4, "a number of tokens expected");
    if (n_vocab < n) n = n_vocab;
    err_info e;
    b->loaded = 0;
    if (cands_load(&b->c, lml_row_ops(L), logits, n, &e)) return lml_fail(L, &e);
    lua_pushvalue(L, 3);
    lua_setiuservalue(L, 1, RNG_SLOT);
    b->loaded = 1;
    lua_pushboolean(L, 1);
    return 1;
}

static int l_release(lua_State *L)
{
    box *b = luaL_checkudata(L, 1, CLASS);
    b->loaded = 0;
    return 0;
}

/* ---- looking ----------------------------------------------------------------------------- */

static int l_len(lua_State *L)
{
    lua_pushinteger(L, check(L)->n);
    return 1;
}

static int l_id(lua_State *L)
{
    cands *c = check(L);
    lua_pushinteger(L, cands_at(c, check_position(L, c))->id);
    return 1;
}

static int l_logit(lua_State *L)
{
    cands *c = check(L);
    lua_pushnumber(L, cands_at(c, check_position(L, c))->logit);
    return 1;
}

static int l_p(lua_State *L)
{
    cands *c = check(L);
    lua_pushnumber(L, cands_p(c, check_position(L, c)));
    return 1;
}

static int l_entropy(lua_State *L)
{
    lua_pushnumber(L, cands_entropy(check(L)));
    return 1;
}

/* ---- changing ---------------------------------------------------------------------------- */

static int l_set(lua_State *L)
{
    cands *c = check(L);
    int64_t at = check_position(L, c);
    double x = luaL_checknumber(L, 3);
    cands_set(c, at, x == -INFINITY ? x : check_range(L, 3, -LOGIT_MAX, LOGIT_MAX));
    return 0;
}

static int l_keep(lua_State *L)
{
    cands *c = check(L);
    lua_Integer n = luaL_checkinteger(L, 2);
    luaL_argcheck(L, n >= 1, 2, "at least 1 expected");
    cands_keep(c, n);
    return 0;
}

/* c:filter(fn): those stay for which fn(id, logit, p) is true. The verdicts are collected first:
 * fn may raise. */
static int l_filter(lua_State *L)
{
    cands *c = check(L);
    luaL_checktype(L, 2, LUA_TFUNCTION);
    int64_t n = c->n;
    char *flags = lua_newuserdatauv(L, (size_t)n + 1, 0);
    for (int64_t i = 0; i < n; i++) {
        lua_pushvalue(L, 2);
        lua_pushinteger(L, cands_at(c, i)->id);
        lua_pushnumber(L, cands_at(c, i)->logit);
        lua_pushnumber(L, cands_p(c, i));
        lua_call(L, 3, 1);
        if (check(L)->n != n) luaL_error(L, "candidates were changed inside filter");
        flags[i] = (char)lua_toboolean(L, -1);
        lua_pop(L, 1);
    }
    cands_filter(c, flags);
    return 0;
}

/* c:pick(u): draws one, which alone is left; u from the policy's generator, or given. */
static int l_pick(lua_State *L)
{
    cands *c = check(L);
    double u;
    if (lua_isnoneornil(L, 2)) {
        lua_settop(L, 1);
        lua_getiuservalue(L, 1, RNG_SLOT);
        u = lml_rng_uniform(L, 2);
    } else {
        u = check_range(L, 2, 0, 1);
        luaL_argcheck(L, u < 1, 2, "less than 1 expected");
    }
    err_info e;
    int32_t id;
    if (cands_pick(c, u, &id, &e)) return lml_fail(L, &e);
    lua_pushinteger(L, id);
    return 1;
}

/* ---- native stages ----------------------------------------------------------------------- */

static int l_temperature(lua_State *L)
{
    cands *c = check(L);
    cands_temperature(c, check_range(L, 2, 0, LOGIT_MAX));
    return 0;
}

static int l_top_k(lua_State *L)
{
    cands *c = check(L);
    lua_Integer k = luaL_checkinteger(L, 2);
    luaL_argcheck(L, k >= 0, 2, "0 or more expected");
    cands_top_k(c, k);
    return 0;
}

static int l_top_p(lua_State *L)
{
    cands *c = check(L);
    cands_top_p(c, check_range(L, 2, 0, 1));
    return 0;
}

static int l_min_p(lua_State *L)
{
    cands *c = check(L);
    cands_min_p(c, check_range(L, 2, 0, 1));
    return 0;
}

static int l_typical_p(lua_State *L)
{
    cands *c = check(L);
    cands_typical(c, check_range(L, 2, 0, 1));
    return 0;
}

/* Room for n ids that lives as long as the candidates do: a penalty runs every step, over a
 * context that only grows. */
static int32_t *scratch(lua_State *L, int64_t n)
{
    size_t n_bytes = (size_t)n * sizeof(int32_t);
    if (lua_getiuservalue(L, 1, SCRATCH_SLOT) != LUA_TUSERDATA || lua_rawlen(L, -1) < n_bytes) {
        lua_newuserdatauv(L, 2 * n_bytes + 64, 0);
        lua_pushvalue(L, -1);
        lua_setiuservalue(L, 1, SCRATCH_SLOT);
    }
    return lua_touserdata(L, -1);
}

/* The last n ids of the array at `arg`. */
static void read_ids(lua_State *L, int arg, int64_t n, int32_t *ids)
{
    lua_Integer first = lml_len(L, arg, INT32_MAX) - n + 1;
    for (lua_Integer i = 0; i < n; i++) {
        int ok;
        lua_rawgeti(L, arg, first + i);
        lua_Integer id = lua_tointegerx(L, -1, &ok);
        if (!ok) luaL_error(L, "bad argument #%d: entry %I is not a token id", arg, first + i);
        ids[i] = id >= 0 && id <= INT32_MAX ? (int32_t)id : -1;
        lua_pop(L, 1);
    }
}

/* c:repetition_penalty(r, prompt_ids, output_ids, last): of both together the last ids count. */
static int l_repetition(lua_State *L)
{
    double r = check_range(L, 2, 1e-6, 1e6);
    luaL_checktype(L, 3, LUA_TTABLE);
    luaL_checktype(L, 4, LUA_TTABLE);
    lua_Integer prompt = lml_len(L, 3, INT32_MAX), output = lml_len(L, 4, INT32_MAX);
    lua_Integer last = luaL_optinteger(L, 5, prompt + output);
    luaL_argcheck(L, last >= 0, 5, "0 or more expected");
    if (output > last) output = last;
    if (prompt > last - output) prompt = last - output;
    int32_t *ids = scratch(L, prompt + output);
    read_ids(L, 3, prompt, ids);
    read_ids(L, 4, output, ids + prompt);
    cands_repetition(check(L), ids, prompt + output, r);
    return 0;
}

/* c:penalty(output_ids, presence, frequency) */
static int l_penalty(lua_State *L)
{
    luaL_checktype(L, 2, LUA_TTABLE);
    double presence = check_range(L, 3, -1e6, 1e6), frequency = check_range(L, 4, -1e6, 1e6);
    lua_Integer n = lml_len(L, 2, INT32_MAX);
    int32_t *ids = scratch(L, n);
    read_ids(L, 2, n, ids);
    cands_penalty(check(L), ids, n, presence, frequency);
    return 0;
}

/* c:bias{[id] = x}: -inf rules out. */
static int l_bias(lua_State *L)
{
    luaL_checktype(L, 2, LUA_TTABLE);
    size_t n = 0;
    for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1)) n++;
    int32_t *ids = lua_newuserdatauv(L, n * sizeof *ids + 1, 0);
    double *x = lua_newuserdatauv(L, n * sizeof *x + 1, 0);
    size_t i = 0;
    for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1), i++) {
        lua_Integer id = lua_isinteger(L, -2) ? lua_tointeger(L, -2) : -1;
        if (id < 0 || id > INT32_MAX)
            luaL_error(L, "bias: %s is not a token id", luaL_tolstring(L, -2, NULL));
        x[i] = lua_isnumber(L, -1) ? lua_tonumber(L, -1) : NAN;
        if (!(x[i] <= LOGIT_MAX && (x[i] >= -LOGIT_MAX || x[i] == -INFINITY)))
            luaL_error(L, "bias of id %I is not a number below inf", id);
        ids[i] = (int32_t)id;
    }
    cands_bias(check(L), ids, x, (int64_t)i);
    return 0;
}

void lml_open_cands(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"bias", l_bias},
        {"close", cands_gc},
        {"entropy", l_entropy},
        {"filter", l_filter},
        {"id", l_id},
        {"keep", l_keep},
        {"load", l_load},
        {"logit", l_logit},
        {"min_p", l_min_p},
        {"p", l_p},
        {"penalty", l_penalty},
        {"pick", l_pick},
        {"release", l_release},
        {"repetition_penalty", l_repetition},
        {"set", l_set},
        {"temperature", l_temperature},
        {"top_k", l_top_k},
        {"top_p", l_top_p},
        {"typical_p", l_typical_p},
        {NULL, NULL},
    };
    lml_class(L, CLASS, methods, cands_gc);
    luaL_getmetatable(L, CLASS);
    lua_pushcfunction(L, l_len);
    lua_setfield(L, -2, "__len");
    lua_pop(L, 1);
    lua_pushcfunction(L, cands_new);
    lua_setfield(L, -2, "candidates");
}
