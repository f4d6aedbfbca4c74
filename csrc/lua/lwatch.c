/* Lua that is looked at while it runs.
 *
 * debug.sethook would do but for one thing: it finds its function by the coroutine, and so does
 * nothing in those that a coroutine with a hook begins. */
#include "lua/lml.h"

#include <limits.h>
#include <stdbool.h>

static const char LOOK; /* its address is the key of the function in the registry */

/* While a hook runs there are no further hooks, and the handler of an xpcall is called before it
 * has ended: one that never ends would not be looked at. What memory errors raise calls no handlers
 * (lua_error in lapi.c). */
static int raise_past_handlers(lua_State *L)
{
    lua_pushliteral(L, "not enough memory");
    return lua_error(L);
}

/* Where there is no room left to look (a C stack that is used up) an error would call a handler,
 * too. */
static void on_count(lua_State *L, lua_Debug *unused)
{
    (void)unused;
    lua_rawgetp(L, LUA_REGISTRYINDEX, &LOOK);
    if (lua_pcall(L, 0, 2, 0) != LUA_OK) raise_past_handlers(L);
    bool ends = lua_toboolean(L, -2);
    bool gives_way = lua_toboolean(L, -1) && lua_isyieldable(L);
    lua_pop(L, 2);
    if (!ends) return;
    if (gives_way) {
        lua_yield(L, 0);
    } else {
        raise_past_handlers(L);
    }
}

/* core.on_look(fn): what is called in the coroutine that is looked at. It answers whether that ends
 * here, by an error that no handler of an xpcall sees; and whether it gives way instead if it can.
 * A coroutine that an error out of a hook has ended has no hooks any more, so that what is closed
 * of it then would not be looked at (luaE_resetthread in lstate.c). */
static int on_look(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TFUNCTION);
    lua_settop(L, 1);
    lua_rawsetp(L, LUA_REGISTRYINDEX, &LOOK);
    return 0;
}

static int check_steps(lua_State *L, int arg)
{
    lua_Integer steps = luaL_checkinteger(L, arg);
    luaL_argcheck(L, steps > 0 && steps <= INT_MAX, arg, "out of range");
    return (int)steps;
}

/* core.look(thread, steps): from now on every so many instructions of the coroutine, and of each
 * that it begins. */
static int look(lua_State *L)
{
    lua_State *thread = lua_tothread(L, 1);
    luaL_argexpected(L, thread, 1, "coroutine");
    lua_sethook(thread, on_count, LUA_MASKCOUNT, check_steps(L, 2));
    return 0;
}

static int end_pcall(lua_State *L, int status, lua_KContext unused)
{
    (void)unused;
    lua_sethook(L, NULL, 0, 0);
    if (status != LUA_OK && status != LUA_YIELD) {
        lua_pushboolean(L, false);
        lua_replace(L, 1);
    }
    return lua_gettop(L);
}

/* core.look_pcall(steps, fn, ...): pcall(fn, ...), looked at meanwhile. The looks end here, as in
 * Lua each instruction may raise by then. */
static int look_pcall(lua_State *L)
{
    int steps = check_steps(L, 1);
    luaL_checkany(L, 2);
    lua_pushboolean(L, true); /* in the place of steps, before the results are there */
    lua_replace(L, 1);
    lua_sethook(L, on_count, LUA_MASKCOUNT, steps);
    return end_pcall(L, lua_pcallk(L, lua_gettop(L) - 2, LUA_MULTRET, 0, 0, end_pcall), 0);
}

void lml_open_watch(lua_State *L)
{
    lua_pushcfunction(L, look);
    lua_setfield(L, -2, "look");
    lua_pushcfunction(L, look_pcall);
    lua_setfield(L, -2, "look_pcall");
    lua_pushcfunction(L, on_look);
    lua_setfield(L, -2, "on_look");
}
