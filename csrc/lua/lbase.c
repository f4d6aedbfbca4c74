/* moonlet.core: a window on the base room, for specs. */
#include "lua/lml.h"

#include "base/pool.h"

typedef struct count {
    unsigned char *hits; /* [n_items] times each item was handed out */
    int n_threads, bad_worker;
} count;

static void count_items(void *ctx, int64_t begin, int64_t end, int worker)
{
    count *c = ctx;
    if (worker < 0 || worker >= c->n_threads) c->bad_worker = 1;
    for (int64_t i = begin; i < end; i++) c->hits[i]++;
}

/* pool_counts(threads, items, grain, loops) -> string of how often each item ran (modulo 256) |
 * nil, message, code */
static int pool_counts(lua_State *L)
{
    lua_Integer threads = luaL_checkinteger(L, 1), items = luaL_checkinteger(L, 2);
    lua_Integer grain = luaL_checkinteger(L, 3), loops = luaL_checkinteger(L, 4);
    luaL_argcheck(L, threads >= INT32_MIN && threads <= INT32_MAX, 1, "out of range");
    luaL_argcheck(L, items >= 0 && items <= 1 << 20, 2, "out of range");
    count c = {.n_threads = (int)threads};
    c.hits = lua_newuserdatauv(L, (size_t)items + 1, 0);
    for (lua_Integer i = 0; i < items; i++) c.hits[i] = 0;
    err_info e;
    pool *p = pool_open((int)threads, &e);
    if (!p) return lml_fail(L, &e);
    for (lua_Integer i = 0; i < loops; i++) pool_for(p, items, grain, count_items, &c);
    pool_close(p);
    if (c.bad_worker) return luaL_error(L, "a worker's index is out of range");
    lua_pushlstring(L, (const char *)c.hits, (size_t)items);
    return 1;
}

void lml_open_base(lua_State *L)
{
    static const luaL_Reg functions[] = {{"pool_counts", pool_counts}, {NULL, NULL}};
    luaL_setfuncs(L, functions, 0);
}
