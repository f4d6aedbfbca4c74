/* Programs that run beside this one. */
#include "lua/lml.h"

#include <signal.h>
#include <string.h>

#include "base/process.h"

#define LPROCESS_CLASS "moonlet.core.process"

enum { MAX_ARGUMENTS = 256, PIECE_BYTES = 16384 };

typedef struct process_box {
    process *p; /* NULL when closed */
} process_box;

static process *check_process(lua_State *L)
{
    process_box *box = luaL_checkudata(L, 1, LPROCESS_CLASS);
    if (!box->p) luaL_error(L, "closed process");
    return box->p;
}

static int close_process(lua_State *L)
{
    process_box *box = luaL_checkudata(L, 1, LPROCESS_CLASS);
    process_close(box->p);
    box->p = NULL;
    return 0;
}

/* core.process_open(argv, cwd) -> process; argv: array of strings, the program first */
static int open_process(lua_State *L)
{
    const char *argv[MAX_ARGUMENTS + 1];
    const char *cwd = luaL_checkstring(L, 2);
    luaL_checktype(L, 1, LUA_TTABLE);
    lua_Integer n = lml_len(L, 1, MAX_ARGUMENTS);
    luaL_argcheck(L, n >= 1, 1, "a program expected");
    for (lua_Integer i = 1; i <= n; i++) {
        size_t length;
        if (lua_rawgeti(L, 1, i) != LUA_TSTRING) luaL_error(L, "arguments: strings expected");
        argv[i - 1] = lua_tolstring(L, -1, &length); /* the table keeps it alive */
        if (strlen(argv[i - 1]) != length) luaL_error(L, "arguments: no NUL bytes expected");
        lua_pop(L, 1);
    }
    argv[n] = NULL;
    process_box *box = lua_newuserdatauv(L, sizeof *box, 0);
    box->p = NULL;
    luaL_setmetatable(L, LPROCESS_CLASS);
    err_info e;
    box->p = process_open(argv, cwd, lml_programs(), &e);
    return box->p ? 1 : lml_fail(L, &e);
}

static int descriptor(lua_State *L)
{
    lua_pushinteger(L, process_fd(check_process(L)));
    return 1;
}

/* process:read() -> bytes, "" when there are none now */
static int read_piece(lua_State *L)
{
    char piece[PIECE_BYTES];
    size_t n = process_read(check_process(L), piece, sizeof piece);
    lua_pushlstring(L, piece, n);
    return 1;
}

/* process:status() -> nil while it runs; exit code, or -1 and the number of a signal */
static int status(lua_State *L)
{
    process_end end;
    if (!process_is_done(check_process(L), &end)) return 0;
    lua_pushinteger(L, end.code);
    if (end.signal == 0) return 1;
    lua_pushinteger(L, end.signal);
    return 2;
}

/* process:kill("TERM"|"KILL") */
static int send_signal(lua_State *L)
{
    static const char *const names[] = {"TERM", "KILL", NULL};
    static const int numbers[] = {SIGTERM, SIGKILL};
    int which = luaL_checkoption(L, 2, NULL, names);
    process_signal(check_process(L), numbers[which]);
    return 0;
}

void lml_open_process(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"close", close_process}, {"fd", descriptor}, {"kill", send_signal},
        {"read", read_piece},     {"status", status}, {NULL, NULL},
    };
    lml_class(L, LPROCESS_CLASS, methods, close_process);
    lua_pushcfunction(L, open_process);
    lua_setfield(L, -2, "process_open");
}
