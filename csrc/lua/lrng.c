/* moonlet.rng: a stream of random numbers, the same for the same seed on every machine. */
#include "lua/lml.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/rng.h"

typedef struct stream {
    rng state;
    lua_Integer seed;
} stream;

static const char CLASS[] = "moonlet.rng";

/* core.rng(seed): without a seed, one from the operating system. */
static int rng_new(lua_State *L)
{
    stream s;
    if (lua_isnoneornil(L, 1)) {
        if (getentropy(&s.seed, sizeof s.seed)) return luaL_error(L, "%s", strerror(errno));
        s.seed &= INT64_MAX; /* a seed to be shown and typed in again: no sign */
    } else {
        s.seed = luaL_checkinteger(L, 1);
    }
    rng_seed(&s.state, (uint64_t)s.seed);
    *(stream *)lua_newuserdatauv(L, sizeof s, 0) = s;
    luaL_setmetatable(L, CLASS);
    return 1;
}

double lml_rng_uniform(lua_State *L, int arg)
{
    stream *s = luaL_checkudata(L, arg, CLASS);
    return rng_uniform(&s->state);
}

static int rng_draw(lua_State *L)
{
    lua_pushnumber(L, lml_rng_uniform(L, 1));
    return 1;
}

static int rng_get_seed(lua_State *L)
{
    stream *s = luaL_checkudata(L, 1, CLASS);
    lua_pushinteger(L, s->seed);
    return 1;
}

/* A second stream that will give the numbers this one is about to give. */
static int rng_clone(lua_State *L)
{
    stream *s = luaL_checkudata(L, 1, CLASS);
    *(stream *)lua_newuserdatauv(L, sizeof *s, 0) = *s;
    luaL_setmetatable(L, CLASS);
    return 1;
}

static int rng_gc(lua_State *L)
{
    luaL_checkudata(L, 1, CLASS);
    return 0;
}

void lml_open_rng(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"clone", rng_clone}, {"seed", rng_get_seed}, {"uniform", rng_draw}, {NULL, NULL}};
    lml_class(L, CLASS, methods, rng_gc);
    lua_pushcfunction(L, rng_new);
    lua_setfield(L, -2, "rng");
}
