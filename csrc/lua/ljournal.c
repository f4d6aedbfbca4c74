/* Journals: what a long piece of work has done so far, for the process that goes on with it. */
#include "lua/lml.h"

#include <string.h>

#include "io/journal.h"

#define JOURNAL "moonlet.journal"

static int push_journal(lua_State *L, journal *(*open)(const char *path, err_info *e))
{
    err_info e = {0};
    const char *path = luaL_checkstring(L, 1);
    journal **j = lua_newuserdatauv(L, sizeof *j, 0);
    *j = NULL;
    luaL_setmetatable(L, JOURNAL);
    *j = open(path, &e);
    return *j ? 1 : lml_fail(L, &e);
}

/* journal_create(path) -> journal, locked by this process; the file must be new */
static int create(lua_State *L)
{
    return push_journal(L, journal_create);
}

/* journal_open(path) -> journal; code "busy" while another process has it open */
static int open_existing(lua_State *L)
{
    return push_journal(L, journal_open);
}

static journal *check_journal(lua_State *L)
{
    journal **j = luaL_checkudata(L, 1, JOURNAL);
    if (!*j) luaL_error(L, "journal is closed");
    return *j;
}

/* j:text() -> the lines that were there when it was opened, what was behind them */
static int text(lua_State *L)
{
    size_t n;
    const char *s = journal_text(check_journal(L), &n);
    lua_pushlstring(L, s, n);
    s = journal_tail(check_journal(L), &n);
    lua_pushlstring(L, s, n);
    return 2;
}

/* j:append(line) -> true: it is on the disk */
static int append(lua_State *L)
{
    size_t n;
    err_info e = {0};
    const char *line = luaL_checklstring(L, 2, &n);
    luaL_argcheck(L, !memchr(line, '\n', n), 2, "one line expected");
    if (journal_append(check_journal(L), line, n, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

static int close_journal(lua_State *L)
{
    journal **j = luaL_checkudata(L, 1, JOURNAL);
    journal_close(*j);
    *j = NULL;
    return 0;
}

void lml_open_journal(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"text", text}, {"append", append}, {"close", close_journal}, {NULL, NULL}};
    static const luaL_Reg functions[] = {
        {"journal_create", create}, {"journal_open", open_existing}, {NULL, NULL}};
    lml_class(L, JOURNAL, methods, close_journal);
    luaL_setfuncs(L, functions, 0);
}
