/* Computations that let others have their turn. */
#include "lua/lml.h"

/* Instructions between two chances to give way; finding out that nobody else wants the thread takes
 * about as long as a tenth of them. */
enum { TURN_STEP = 256 };

/* Inside a C function that cannot be left (a comparison of table.sort, a finalizer) the computation
 * goes on until it has returned. */
static void on_count(lua_State *L, lua_Debug *unused)
{
    (void)unused;
    if (lua_isyieldable(L)) lua_yield(L, 0);
}

/* core.give_way(on) -> whether that changed anything: the running coroutine yields nothing every so
 * many instructions, wherever it is. Leaves alone what somebody else has hooked. */
static int give_way(lua_State *L)
{
    int on = lua_toboolean(L, 1);
    lua_Hook now = lua_gethook(L);
    int changes = on ? !now : now == on_count;
    if (changes) lua_sethook(L, on ? on_count : NULL, on ? LUA_MASKCOUNT : 0, TURN_STEP);
    lua_pushboolean(L, changes);
    return 1;
}

void lml_open_turn(lua_State *L)
{
    lua_pushcfunction(L, give_way);
    lua_setfield(L, -2, "give_way");
}
