/* The process around the interpreter: interrupts. */
#include "lua/lml.h"

#include <signal.h>

/* A signal handler can reach nothing but a global: the one mutable global of moonlet. */
static cancel_flag interrupted;

cancel_flag *lml_cancel_flag(void)
{
    return &interrupted;
}

/* A second Ctrl-C finds the default handler and ends the process. */
static void on_interrupt(int signal_number)
{
    atomic_store(&interrupted, 1);
    signal(signal_number, SIG_DFL);
}

/* core.catch_interrupt(): from now on Ctrl-C stops computations, which then fail with "cancelled",
 * instead of killing the process at once. */
static int catch_interrupt(lua_State *L)
{
    (void)L;
    atomic_store(&interrupted, 0);
    signal(SIGINT, on_interrupt);
    return 0;
}

/* core.interrupted() -> boolean */
static int was_interrupted(lua_State *L)
{
    lua_pushboolean(L, cancel_raised(&interrupted));
    return 1;
}

void lml_open_sys(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"catch_interrupt", catch_interrupt}, {"interrupted", was_interrupted}, {NULL, NULL}};
    luaL_setfuncs(L, functions, 0);
}
