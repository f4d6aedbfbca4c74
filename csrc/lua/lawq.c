/* Vectors of scales for moonlet.awq: strings of f32 in, strings of f32 out. */
#include "lua/lml.h"

#include <float.h>
#include <string.h>

#include "quant/awq.h"

static const float *check_floats(lua_State *L, int arg, int64_t *n)
{
    size_t bytes;
    const char *s = luaL_checklstring(L, arg, &bytes);
    luaL_argcheck(L, bytes % sizeof(float) == 0, arg, "string of floats expected");
    *n = (int64_t)(bytes / sizeof(float));
    return lml_floats(L, s, bytes);
}

static const float *check_n_floats(lua_State *L, int arg, int64_t expected)
{
    int64_t n;
    const float *x = check_floats(L, arg, &n);
    luaL_argcheck(L, n == expected, arg, "not as many floats");
    return x;
}

/* outer, repeat and inner from `arg` on */
static awq_span check_span(lua_State *L, int arg, int64_t *n)
{
    awq_span s = {luaL_checkinteger(L, arg), luaL_checkinteger(L, arg + 1),
                  luaL_checkinteger(L, arg + 2)};
    luaL_argcheck(L,
                  s.outer > 0 && s.repeat > 0 && s.inner > 0 &&
                      !__builtin_mul_overflow(s.outer, s.inner, n) && *n <= INT32_MAX &&
                      s.repeat <= INT32_MAX,
                  arg, "sizes expected");
    return s;
}

static float *start(lua_State *L, luaL_Buffer *b, int64_t n)
{
    return (float *)(void *)luaL_buffinitsize(L, b, (size_t)n * sizeof(float));
}

static int finish(luaL_Buffer *b, int64_t n)
{
    luaL_pushresultsize(b, (size_t)n * sizeof(float));
    return 1;
}

/* awq_scales(importance, outer, repeat, inner, alpha, gain, share, least) -> s */
static int scales(lua_State *L)
{
    int64_t n = 0;
    awq_span span = check_span(L, 2, &n);
    float alpha = (float)luaL_checknumber(L, 5), gain = (float)luaL_checknumber(L, 6);
    awq_floor quiet = {(float)luaL_checknumber(L, 7), (float)luaL_checknumber(L, 8)};
    luaL_argcheck(L, gain > 0 && gain <= FLT_MAX, 6, "positive number expected");
    const float *importance = check_n_floats(L, 1, n * span.repeat);
    luaL_Buffer b;
    awq_scales(importance, span, alpha, gain, quiet, start(L, &b, n));
    return finish(&b, n);
}

/* awq_spread(s, outer, repeat, inner) -> a scale for every column */
static int spread(lua_State *L)
{
    int64_t n = 0;
    awq_span span = check_span(L, 2, &n);
    const float *s = check_n_floats(L, 1, n);
    luaL_Buffer b;
    awq_spread(s, span, start(L, &b, n * span.repeat));
    return finish(&b, n * span.repeat);
}

/* awq_fold_norm(norm, s, dtype, subtract) -> col_scale of the norm, col_scale of its readers */
static int fold_norm(lua_State *L)
{
    static const char *const dtypes[] = {"f32", "f16", "bf16", NULL}; /* num_dtype's order */
    int64_t n;
    num_dtype dtype = (num_dtype)luaL_checkoption(L, 3, NULL, dtypes);
    float subtract = (float)luaL_checknumber(L, 4);
    const float *norm = check_floats(L, 1, &n), *s = check_n_floats(L, 2, n);
    float *both = lua_newuserdatauv(L, (size_t)n * 2 * sizeof *both + 1, 0);
    awq_fold_norm(norm, s, n, dtype, subtract, both, both + n);
    lua_pushlstring(L, (const char *)both, (size_t)n * sizeof *both);
    lua_pushlstring(L, (const char *)(both + n), (size_t)n * sizeof *both);
    return 2;
}

/* awq_reciprocal(s) -> 1 / s */
static int reciprocal(lua_State *L)
{
    int64_t n;
    const float *s = check_floats(L, 1, &n);
    luaL_Buffer b;
    float *out = start(L, &b, n);
    for (int64_t i = 0; i < n; i++) out[i] = 1 / s[i];
    return finish(&b, n);
}

/* awq_weights(importance, col_scale or nil [, share = 1 [, power = 1]]) -> what errors count */
static int weights(lua_State *L)
{
    int64_t n;
    const float *x = check_floats(L, 1, &n);
    const float *s = lua_isnil(L, 2) ? NULL : check_n_floats(L, 2, n);
    float share = (float)luaL_optnumber(L, 3, 1), power = (float)luaL_optnumber(L, 4, 1);
    luaL_Buffer b;
    awq_weights(x, s, n, share, power, start(L, &b, n));
    return finish(&b, n);
}

void lml_open_awq(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"awq_fold_norm", fold_norm}, {"awq_weights", weights}, {"awq_reciprocal", reciprocal},
        {"awq_scales", scales},       {"awq_spread", spread},   {NULL, NULL},
    };
    luaL_setfuncs(L, functions, 0);
}
