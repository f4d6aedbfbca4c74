/* Lua that is looked at while it runs.
 *
 * debug.sethook would do but for one thing: it finds its function by the coroutine, and so does
 * nothing in those that a coroutine with a hook begins. */
#include "lua/lml.h"

#include <limits.h>

static const char LOOK; /* its address is the key of the function in the registry */

/* While a hook runs there are no further hooks, and the handler of an xpcall is called before it
 * has ended: one that never ends would not be looked at. What memory errors raise calls no handlers
 * (lua_error in lapi.c). */
static int raise_past_handlers(lua_State *L)
{
    lua_pushliteral(L, "not enough memory");
    return lua_error(L);
}

static void on_count(lua_State *L, lua_Debug *unused)
{
    (void)unused;
    lua_rawgetp(L, LUA_REGISTRYINDEX, &LOOK);
    lua_call(L, 0, 1);
    if (lua_toboolean(L, -1)) raise_past_handlers(L);
    lua_pop(L, 1);
}

/* core.on_look(fn): what is called, in the coroutine that is looked at; it may raise, or
 * answer true: then an error is raised that no handler of an xpcall sees. */
static int on_look(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TFUNCTION);
    lua_settop(L, 1);
    lua_rawsetp(L, LUA_REGISTRYINDEX, &LOOK);
    return 0;
}

/* core.look(thread, steps): from now on every so many instructions of the coroutine, and of each
 * that it begins; 0: no more. */
static int look(lua_State *L)
{
    lua_State *thread = lua_tothread(L, 1);
    lua_Integer steps = luaL_checkinteger(L, 2);
    luaL_argexpected(L, thread, 1, "coroutine");
    luaL_argcheck(L, steps >= 0 && steps <= INT_MAX, 2, "out of range");
    lua_sethook(thread, steps > 0 ? on_count : NULL, steps > 0 ? LUA_MASKCOUNT : 0, (int)steps);
    return 0;
}

void lml_open_watch(lua_State *L)
{
    lua_pushcfunction(L, look);
    lua_setfield(L, -2, "look");
    lua_pushcfunction(L, on_look);
    lua_setfield(L, -2, "on_look");
}
