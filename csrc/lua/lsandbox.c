/* Sandboxes: Lua code from others, in a state of its own.
 *
 * Such a state has the pure part of the standard library, nothing of the process, and no way to
 * keep an error from ending the call: no pcall, no coroutines, no metatables (whose finalizers no
 * hook can stop). Values go in and out as copies: nil, booleans, numbers, strings and tables of
 * them; functions come out as handles that can be called and passed back in.
 *
 * Every call may spend a number of instructions. What takes longer than its instruction shows is
 * charged: memory where it is allocated, library functions by what they go through. What is left
 * uncharged (comparing long strings, copying arguments) is bounded by the largest block that may be
 * allocated. Whether a call succeeds does not depend on the machine or its load. string.find and
 * its kind, which could not be stopped, are not here: moonlet.sandbox brings them in Lua. */
#include "lua/lml.h"

#include <lualib.h>
#include <stdlib.h>
#include <string.h>

#include "base/cancel.h"

#define SANDBOX  "moonlet.sandbox"
#define FUNCTION "moonlet.sandbox.function"

enum {
    HOOK_STEP = 1000,       /* instructions between two looks at the budget */
    MAX_DEPTH = 8,          /* of tables that go in or out */
    MAX_SOURCE = 256 << 10, /* bytes of a chunk: parsing is not charged */
    STACK_ROOM = 4 * MAX_DEPTH + 16,
    BYTES_PER_STEP = 64, /* of memory allocated */
    TEXT_PER_STEP = 16,  /* bytes of strings gone through */
    COPY_STEPS = 32,     /* a value that goes out, which the host pays for, */
    COPY_PER_STEP = 2,   /* and bytes of it, if it is a string */
};

typedef struct sandbox {
    lua_State *inside; /* NULL: closed */
    size_t used, memory, block;
    int64_t budget, instructions;
    err_code stopped; /* why a limit ended the call, or ERR_NONE */
    int busy;         /* within a call: finalizers outside must not close or call */
} sandbox;

/* ---- limits -----------------------------------------------------------------------------------
 */

static void *allocate(void *owner, void *p, size_t old, size_t size)
{
    sandbox *s = owner;
    if (!p) old = 0; /* it names a kind of object then */
    if (size == 0) {
        free(p);
        s->used -= old;
        return NULL;
    }
    if (size > old) {
        if (size > s->block || size - old > s->memory - s->used) return NULL;
        s->budget -= (int64_t)(size / BYTES_PER_STEP);
    }
    void *q = realloc(p, size);
    if (!q) return size <= old ? p : NULL; /* Lua does not expect shrinking to fail */
    s->used = s->used - old + size;
    return q;
}

static sandbox *owner_of(lua_State *B)
{
    void *s;
    lua_getallocf(B, &s);
    return s;
}

static void stop(lua_State *B, err_code why, const char *text)
{
    owner_of(B)->stopped = why;
    lua_pushstring(B, text);
    lua_error(B);
}

static void spend(lua_State *B, double steps)
{
    sandbox *s = owner_of(B);
    s->budget -= steps < 1e15 ? (int64_t)steps : (int64_t)1e15;
    if (s->budget < 0) stop(B, ERR_LIMIT, "runs too long");
}

static void on_count(lua_State *B, lua_Debug *unused)
{
    (void)unused;
    if (cancel_raised(lml_cancel_flag())) stop(B, ERR_CANCELLED, "interrupted");
    spend(B, HOOK_STEP);
}

/* ---- the library ------------------------------------------------------------------------------
 */

/* What a function goes through, beside its results. */
typedef enum cost {
    RESULTS, /* nothing else */
    TEXTS,   /* its strings */
    SHIFTS,  /* the list, if there is an argument `arg` */
    RANGE,   /* entries from argument `arg` to the next */
    SORTS,   /* the list, several times */
    REPEATS, /* string.rep */
} cost;

static double range_of(lua_State *B, int arg)
{
    double first = lua_isnoneornil(B, arg) ? 1 : (double)lua_tointeger(B, arg);
    double last = (double)(lua_isnoneornil(B, arg + 1) ? (lua_Integer)lua_rawlen(B, 1)
                                                       : lua_tointeger(B, arg + 1));
    return last < first ? 0 : last - first + 1;
}

static double steps_of(lua_State *B, cost kind, int arg)
{
    double n = (double)lua_rawlen(B, 1);
    if (kind == SHIFTS) return lua_gettop(B) >= arg ? n / 4 : 0;
    if (kind == RANGE) return range_of(B, arg);
    if (kind == SORTS) return 20 * n; /* log2 of more than a block holds */
    if (kind == REPEATS) {
        double times = (double)lua_tointeger(B, 2);
        n += (double)lua_rawlen(B, 3);
        return times < 0 ? 0 : times * (n / TEXT_PER_STEP + 0.25); /* empty ones take time, too */
    }
    n = 0;
    for (int i = kind == TEXTS ? lua_gettop(B) : 0; i > 0; i--)
        if (lua_type(B, i) == LUA_TSTRING) n += (double)lua_rawlen(B, i) / TEXT_PER_STEP;
    return n;
}

/* Upvalues: a library function that has none of its own, its cost and cost argument. */
static int charged(lua_State *B)
{
    cost kind = (cost)lua_tointeger(B, lua_upvalueindex(2));
    spend(B, steps_of(B, kind, (int)lua_tointeger(B, lua_upvalueindex(3))));
    int n = lua_tocfunction(B, lua_upvalueindex(1))(B);
    spend(B, n);
    return n;
}

/* find_plain(text, piece, from) -> first, last, or nil: what patterns.lua's string.find builds on
 */
static int find_plain(lua_State *B)
{
    size_t n, n_piece;
    const char *text = luaL_checklstring(B, 1, &n);
    const char *piece = luaL_checklstring(B, 2, &n_piece);
    lua_Integer from = luaL_checkinteger(B, 3);
    spend(B, (double)(n + n_piece) / TEXT_PER_STEP);
    const char *at = NULL;
    if (from >= 1 && (size_t)from <= n + 1)
        at = memmem(text + from - 1, n - (size_t)from + 1, piece, n_piece);
    if (!at) return 0;
    lua_pushinteger(B, at - text + 1);
    lua_pushinteger(B, at - text + (lua_Integer)n_piece);
    return 2;
}

typedef struct member {
    const char *name;
    cost cost;
    int arg;
} member;

typedef struct library {
    const char *name; /* NULL: the globals */
    lua_CFunction open;
    const char *const *free; /* members of it that are cheap, */
    const member *charged;   /* and those that are not; the rest stays out */
} library;

static const char *const BASE_FREE[] = {"assert", "error",    "ipairs",   "next",
                                        "pairs",  "type",     "rawequal", "rawlen",
                                        "select", "tostring", "_VERSION", NULL};
static const member BASE_CHARGED[] = {{"tonumber", TEXTS, 0}, {NULL, RESULTS, 0}};

static const char *const STRING_FREE[] = {"len", "sub", NULL};
static const member STRING_CHARGED[] = {
    {"byte", RESULTS, 0}, {"char", TEXTS, 0},     {"format", TEXTS, 0}, {"lower", TEXTS, 0},
    {"pack", TEXTS, 0},   {"packsize", TEXTS, 0}, {"rep", REPEATS, 0},  {"reverse", TEXTS, 0},
    {"unpack", TEXTS, 0}, {"upper", TEXTS, 0},    {NULL, RESULTS, 0}};

static const char *const TABLE_FREE[] = {"pack", NULL};
static const member TABLE_CHARGED[] = {
    {"concat", RANGE, 3}, {"insert", SHIFTS, 3}, {"move", RANGE, 2}, {"remove", SHIFTS, 2},
    {"sort", SORTS, 0},   {"unpack", RANGE, 2},  {NULL, RESULTS, 0}};

/* No random numbers: what a sandbox answers is the same every time. */
static const char *const MATH_FREE[] = {
    "abs",  "acos", "asin", "atan", "ceil", "cos",        "deg",        "exp",  "floor",
    "fmod", "huge", "log",  "max",  "min",  "maxinteger", "mininteger", "modf", "pi",
    "rad",  "sin",  "sqrt", "tan",  "type", "ult",        "tointeger",  NULL};

static const char *const UTF8_FREE[] = {"charpattern", NULL};
static const member UTF8_CHARGED[] = {{"char", TEXTS, 0},   {"codepoint", TEXTS, 0},
                                      {"codes", TEXTS, 0},  {"len", TEXTS, 0},
                                      {"offset", TEXTS, 0}, {NULL, RESULTS, 0}};

static const library LIBRARIES[] = {
    {NULL, luaopen_base, BASE_FREE, BASE_CHARGED},
    {"string", luaopen_string, STRING_FREE, STRING_CHARGED},
    {"table", luaopen_table, TABLE_FREE, TABLE_CHARGED},
    {"math", luaopen_math, MATH_FREE, NULL},
    {"utf8", luaopen_utf8, UTF8_FREE, UTF8_CHARGED},
};

/* Pushes a table with what `lib` lets through. */
static void push_library(lua_State *B, const library *lib)
{
    luaL_requiref(B, lib->name ? lib->name : LUA_GNAME, lib->open, 0);
    lua_newtable(B);
    for (const char *const *name = lib->free; *name; name++) {
        lua_getfield(B, -2, *name);
        lua_setfield(B, -2, *name);
    }
    for (const member *m = lib->charged; m && m->name; m++) {
        lua_getfield(B, -2, m->name);
        lua_pushinteger(B, m->cost);
        lua_pushinteger(B, m->arg);
        lua_pushcclosure(B, charged, 3);
        lua_setfield(B, -2, m->name);
    }
    lua_remove(B, -2);
}

/* Fills a new state; runs protected. */
static int furnish(lua_State *B)
{
    for (size_t i = 0; i < sizeof LIBRARIES / sizeof *LIBRARIES; i++) {
        push_library(B, &LIBRARIES[i]);
        if (i == 0) continue; /* the globals, at index 1 */
        lua_pushvalue(B, -1);
        lua_setfield(B, 1, LIBRARIES[i].name);
    }
    lua_pushliteral(B, ""); /* methods of strings are those of the table that was let through */
    lua_getmetatable(B, -1);
    lua_getfield(B, 1, "string");
    lua_pushcfunction(B, find_plain);
    lua_setfield(B, -2, "find");
    lua_setfield(B, -2, "__index");
    lua_pushvalue(B, 1);
    lua_rawseti(B, LUA_REGISTRYINDEX, LUA_RIDX_GLOBALS);
    lua_newtable(B);
    lua_rawsetp(B, LUA_REGISTRYINDEX, LIBRARIES);
    return 0;
}

/* ---- values -----------------------------------------------------------------------------------
 */

/* Functions that went out: a table id -> function and function -> id. */
static void push_functions(lua_State *B)
{
    lua_rawgetp(B, LUA_REGISTRYINDEX, LIBRARIES);
}

typedef struct handle {
    lua_Integer id; /* uservalue 1: the sandbox */
} handle;

/* Raises unless the value at i, of the host, can go into the sandbox s. */
static void check_in(lua_State *L, const sandbox *s, int i, int depth)
{
    luaL_checkstack(L, STACK_ROOM, NULL);
    int type = lua_type(L, i);
    if (type == LUA_TUSERDATA && luaL_testudata(L, i, FUNCTION)) {
        lua_getiuservalue(L, i, 1);
        if (lua_touserdata(L, -1) != s) luaL_error(L, "a function of another sandbox");
        lua_pop(L, 1);
    } else if (type == LUA_TTABLE) {
        if (depth == MAX_DEPTH) luaL_error(L, "tables for a sandbox nest at most %d deep", depth);
        lua_pushnil(L);
        while (lua_next(L, i)) {
            int top = lua_gettop(L);
            check_in(L, s, top - 1, MAX_DEPTH);
            check_in(L, s, top, depth + 1);
            lua_pop(L, 1);
        }
    } else if (type != LUA_TNIL && type != LUA_TBOOLEAN && type != LUA_TNUMBER &&
               type != LUA_TSTRING) {
        luaL_error(L, "a sandbox takes no %s", luaL_typename(L, i));
    }
}

/* Pushes a copy of the host's value, which check_in let through. Within a protected call of B; of
 * the host's functions it uses those that cannot raise. */
static void copy_in(lua_State *L, int i, lua_State *B)
{
    luaL_checkstack(B, STACK_ROOM, NULL);
    switch (lua_type(L, i)) {
    case LUA_TBOOLEAN: lua_pushboolean(B, lua_toboolean(L, i)); return;
    case LUA_TNUMBER:
        if (lua_isinteger(L, i))
            lua_pushinteger(B, lua_tointeger(L, i));
        else
            lua_pushnumber(B, lua_tonumber(L, i));
        return;
    case LUA_TSTRING: {
        size_t n;
        const char *text = lua_tolstring(L, i, &n);
        lua_pushlstring(B, text, n);
        return;
    }
    case LUA_TUSERDATA:
        push_functions(B);
        lua_rawgeti(B, -1, ((const handle *)lua_touserdata(L, i))->id);
        lua_remove(B, -2);
        return;
    case LUA_TTABLE:
        lua_newtable(B);
        lua_pushnil(L);
        while (lua_next(L, i)) {
            int top = lua_gettop(L);
            copy_in(L, top - 1, B);
            copy_in(L, top, B);
            lua_rawset(B, -3);
            lua_pop(L, 1);
        }
        return;
    default: lua_pushnil(B);
    }
}

/* Raises unless the value at i can go out. Charged, as it may refer to one table many times. */
static void check_out(lua_State *B, int i, int depth)
{
    luaL_checkstack(B, STACK_ROOM, NULL);
    int type = lua_type(B, i);
    spend(B, COPY_STEPS + (type == LUA_TSTRING ? (double)lua_rawlen(B, i) / COPY_PER_STEP : 0));
    if (type == LUA_TFUNCTION) {
        push_functions(B);
        lua_pushvalue(B, i);
        if (lua_rawget(B, -2) == LUA_TNIL) {
            lua_Integer id = (lua_Integer)lua_rawlen(B, -2) + 1;
            lua_pushvalue(B, i);
            lua_pushinteger(B, id);
            lua_rawset(B, -4);
            lua_pushvalue(B, i);
            lua_rawseti(B, -3, id);
        }
        lua_pop(B, 2);
    } else if (type == LUA_TTABLE) {
        if (depth == MAX_DEPTH) luaL_error(B, "returned tables nested more than %d deep", depth);
        lua_pushnil(B);
        while (lua_next(B, i)) {
            int top = lua_gettop(B);
            if (lua_type(B, top - 1) == LUA_TTABLE || lua_type(B, top - 1) == LUA_TFUNCTION)
                luaL_error(B, "returned a table with a %s for a key", luaL_typename(B, top - 1));
            check_out(B, top - 1, depth);
            check_out(B, top, depth + 1);
            lua_pop(B, 1);
        }
    }
}

/* Pushes a copy of the value at i, which check_out let through, on the host's stack; box: the
 * sandbox there. May raise in the host; uses functions of B that cannot raise. */
static void copy_out(lua_State *B, int i, lua_State *L, int box)
{
    luaL_checkstack(L, STACK_ROOM, NULL);
    switch (lua_type(B, i)) {
    case LUA_TBOOLEAN: lua_pushboolean(L, lua_toboolean(B, i)); return;
    case LUA_TNUMBER:
        if (lua_isinteger(B, i))
            lua_pushinteger(L, lua_tointeger(B, i));
        else
            lua_pushnumber(L, lua_tonumber(B, i));
        return;
    case LUA_TSTRING: {
        size_t n;
        const char *text = lua_tolstring(B, i, &n);
        lua_pushlstring(L, text, n);
        return;
    }
    case LUA_TFUNCTION: {
        handle *h = lua_newuserdatauv(L, sizeof *h, 1);
        push_functions(B);
        lua_pushvalue(B, i);
        lua_rawget(B, -2);
        h->id = lua_tointeger(B, -1);
        lua_pop(B, 2);
        lua_pushvalue(L, box);
        lua_setiuservalue(L, -2, 1);
        luaL_setmetatable(L, FUNCTION);
        return;
    }
    case LUA_TTABLE:
        lua_newtable(L);
        lua_pushnil(B);
        while (lua_next(B, i)) {
            int top = lua_gettop(B);
            copy_out(B, top - 1, L, box);
            copy_out(B, top, L, box);
            lua_rawset(L, -3);
            lua_pop(B, 1);
        }
        return;
    default: lua_pushnil(L);
    }
}

/* ---- calls ------------------------------------------------------------------------------------
 */

typedef struct call {
    lua_State *host;
    lua_Integer id; /* of the function; its arguments are first..last of the host */
    int first, last;
    const char *text, *name; /* or a chunk to compile */
    size_t length;
} call;

/* Runs inside, protected: argument 1 is the call. */
static int enter(lua_State *B)
{
    const call *c = lua_touserdata(B, 1);
    lua_settop(B, 0);
    if (c->text) {
        if (luaL_loadbufferx(B, c->text, c->length, c->name, "t")) return lua_error(B);
    } else {
        push_functions(B);
        lua_rawgeti(B, -1, c->id);
        lua_remove(B, -2);
        for (int i = c->first; i <= c->last; i++) copy_in(c->host, i, B);
        lua_call(B, c->last - c->first + 1, LUA_MULTRET);
    }
    int n = lua_gettop(B);
    for (int i = 1; i <= n; i++) check_out(B, i, 0);
    return n;
}

/* The first line of an error, fit for a terminal: it may say anything. */
static void set_problem(const sandbox *s, int status, err_info *e)
{
    lua_State *B = s->inside;
    char text[400];
    size_t n = 0;
    if (status == LUA_ERRMEM) {
        err_set(e, ERR_LIMIT, "needs more than %zu KiB of memory, or %zu KiB in one piece",
                s->memory >> 10, s->block >> 10);
        return;
    }
    if (lua_type(B, -1) != LUA_TSTRING) {
        err_set(e, ERR_FORMAT, "(error object is a %s value)", luaL_typename(B, -1));
        return;
    }
    for (const char *from = lua_tostring(B, -1); *from && *from != '\n'; from++) {
        if (n == sizeof text - 1) break;
        text[n++] = (unsigned char)*from < ' ' || *from == 0x7f ? '?' : *from;
    }
    text[n] = 0;
    err_set(e, s->stopped ? s->stopped : ERR_FORMAT, "%s", text);
}

/* Arguments: the sandbox, and its userdata. Pushes copies of what the call left inside. */
static int copy_results(lua_State *L)
{
    sandbox *s = lua_touserdata(L, 1);
    int n = lua_gettop(s->inside);
    if (!lua_checkstack(s->inside, STACK_ROOM)) return luaL_error(L, "out of memory");
    luaL_checkstack(L, n, NULL);
    for (int i = 1; i <= n; i++) copy_out(s->inside, i, L, 2);
    return n;
}

/* Pushes the results on the host's stack and returns their number, or nil, message, code and
 * returns -1. box: index of the userdata. */
static int run(lua_State *L, sandbox *s, int box, call *c)
{
    lua_State *B = s->inside;
    err_info e = {0};
    int top = lua_gettop(L);
    s->busy = 1;
    s->budget = s->instructions;
    s->stopped = ERR_NONE;
    lua_settop(B, 0);
    lua_sethook(B, on_count, LUA_MASKCOUNT, HOOK_STEP);
    lua_pushcfunction(B, enter);
    lua_pushlightuserdata(B, c);
    int status = lua_pcall(B, 1, LUA_MULTRET, 0);
    if (status) {
        set_problem(s, status, &e);
        lua_settop(B, 0);
        s->busy = 0;
        lml_fail(L, &e);
        return -1;
    }
    lua_pushcfunction(L, copy_results);
    lua_pushlightuserdata(L, s);
    lua_pushvalue(L, box);
    status = lua_pcall(L, 2, LUA_MULTRET, 0);
    lua_settop(B, 0);
    s->busy = 0;
    if (status) return lua_error(L);
    return lua_gettop(L) - top;
}

static void check_usable(lua_State *L, const sandbox *s)
{
    if (!s->inside) luaL_error(L, "sandbox is closed");
    if (s->busy) luaL_error(L, "sandbox is in use");
}

/* f(...) -> true and its results, or nil, message, code: "limit" for instructions and memory,
 * "format" for an error that it raises */
static int call_function(lua_State *L)
{
    const handle *h = luaL_checkudata(L, 1, FUNCTION);
    int last = lua_gettop(L);
    lua_getiuservalue(L, 1, 1);
    int box = lua_gettop(L);
    sandbox *s = lua_touserdata(L, box);
    for (int i = 2; i <= last; i++) check_in(L, s, i, 0);
    check_usable(L, s);
    luaL_checkstack(L, STACK_ROOM, NULL);
    lua_pushboolean(L, 1);
    call c = {.host = L, .id = h->id, .first = 2, .last = last};
    int n = run(L, s, box, &c);
    return n < 0 ? 3 : n + 1;
}

/* box:load(text, name) -> function, not yet called, or nil, message, code; text chunks only */
static int load_chunk(lua_State *L)
{
    err_info e = {0};
    sandbox *s = luaL_checkudata(L, 1, SANDBOX);
    call c = {.host = L};
    c.text = luaL_checklstring(L, 2, &c.length);
    c.name = lua_pushfstring(L, "=%s", luaL_checkstring(L, 3));
    check_usable(L, s);
    if (c.length > MAX_SOURCE) {
        err_set(&e, ERR_LIMIT, "longer than %d KiB", MAX_SOURCE >> 10);
        return lml_fail(L, &e);
    }
    int n = run(L, s, 1, &c);
    return n < 0 ? 3 : n;
}

/* ---- sandboxes --------------------------------------------------------------------------------
 */

static int close_sandbox(lua_State *L)
{
    sandbox *s = luaL_checkudata(L, 1, SANDBOX);
    if (s->busy) luaL_error(L, "sandbox is in use");
    if (s->inside) lua_close(s->inside);
    s->inside = NULL;
    return 0;
}

static size_t opt_size(lua_State *L, const char *key, lua_Integer fallback)
{
    lua_Integer n = lml_opt_int(L, 1, key, fallback);
    if (n < 1) luaL_error(L, "option '%s' must be positive", key);
    return (size_t)n;
}

/* sandbox_open{memory=, block=, instructions=} -> sandbox: bytes in all and in one piece (64 MiB, 1
 * MiB), instructions of a call (a million) */
static int open_sandbox(lua_State *L)
{
    static const char *const keys[] = {"memory", "block", "instructions", NULL};
    err_info e = {0};
    lml_check_keys(L, 1, keys);
    sandbox wanted = {.memory = opt_size(L, "memory", 64 << 20),
                      .block = opt_size(L, "block", 1 << 20),
                      .instructions = (int64_t)opt_size(L, "instructions", 1000000)};
    sandbox *s = lua_newuserdatauv(L, sizeof *s, 0);
    *s = wanted;
    luaL_setmetatable(L, SANDBOX);
    s->budget = s->instructions;
    s->inside = lua_newstate(allocate, s);
    if (s->inside) {
        lua_pushcfunction(s->inside, furnish);
        if (!lua_pcall(s->inside, 0, 0, 0)) return 1;
    }
    err_set(&e, ERR_MEMORY, "no memory for a sandbox of %zu KiB", s->memory >> 10);
    return lml_fail(L, &e);
}

/* sandbox_is_function(x) -> boolean: x is a handle that came out of a sandbox */
static int is_function(lua_State *L)
{
    lua_pushboolean(L, luaL_testudata(L, 1, FUNCTION) != NULL);
    return 1;
}

void lml_open_sandbox(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"load", load_chunk}, {"close", close_sandbox}, {NULL, NULL}};
    static const luaL_Reg functions[] = {
        {"sandbox_open", open_sandbox}, {"sandbox_is_function", is_function}, {NULL, NULL}};
    lml_class(L, SANDBOX, methods, close_sandbox);
    luaL_newmetatable(L, FUNCTION);
    lua_pushcfunction(L, call_function);
    lua_setfield(L, -2, "__call");
    lua_pop(L, 1);
    luaL_setfuncs(L, functions, 0);
}
