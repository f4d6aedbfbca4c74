#include "lua/lguard.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GUARD "moonlet.guard"

typedef struct guard {
    void *map;
    size_t n_bytes;
} guard;

static void unmap(guard *g)
{
    if (g->map) munmap(g->map, g->n_bytes);
    g->map = NULL;
}

static int guard_gc(lua_State *L)
{
    unmap(luaL_checkudata(L, 1, GUARD));
    return 0;
}

void *lguard_new(lua_State *L, size_t n)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (n + page - 1) / page * page;
    guard *g = lua_newuserdatauv(L, sizeof *g, 0);
    *g = (guard){0};
    luaL_setmetatable(L, GUARD);
    void *map = mmap(NULL, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) luaL_error(L, "cannot map %I bytes", (LUAI_UACINT)n);
    *g = (guard){map, body + page};
    if (mprotect((char *)map + body, page, PROT_NONE) != 0) luaL_error(L, "cannot protect a page");
    return (char *)map + body - n;
}

void *lguard_copy(lua_State *L, const void *bytes, size_t n)
{
    void *p = lguard_new(L, n);
    if (n) memcpy(p, bytes, n);
    return p;
}

void *lguard_array(lua_State *L, const char *key, size_t size, int64_t *n)
{
    size_t n_bytes;
    if (lml_get(L, 3, key) == LUA_TNIL && !n) return NULL;
    if (lua_type(L, -1) != LUA_TSTRING) luaL_error(L, "'%s': string expected", key);
    const char *bytes = lua_tolstring(L, -1, &n_bytes);
    if (n_bytes % size != 0) luaL_error(L, "'%s': not a whole number of elements", key);
    if (n) *n = (int64_t)(n_bytes / size);
    return lguard_copy(L, bytes, n_bytes);
}

float *lguard_floats(lua_State *L, const char *key, int64_t n)
{
    int64_t got;
    float *p = lguard_array(L, key, sizeof(float), &got);
    if (got != n)
        luaL_error(L, "'%s': %I numbers expected, got %I", key, (LUAI_UACINT)n, (LUAI_UACINT)got);
    return p;
}

void lguard_free(lua_State *L, int first, int last)
{
    for (int i = first; i <= last; i++) {
        guard *g = luaL_testudata(L, i, GUARD);
        if (g) unmap(g);
    }
}

void lguard_open(lua_State *L)
{
    static const luaL_Reg none[] = {{NULL, NULL}};
    lml_class(L, GUARD, none, guard_gc);
}
