/* moonlet.core: a window on the base room, for specs and measurements. */
#include "lua/lml.h"

#include "base/bandwidth.h"
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

/* pool_counts(threads, items, grain, loops [, look]) -> string of how often each item ran (modulo
 * 256), whether the look-th look at a flag has cut a loop | nil, message, code */
static int pool_counts(lua_State *L)
{
    lua_Integer threads = luaL_checkinteger(L, 1), items = luaL_checkinteger(L, 2);
    lua_Integer grain = luaL_checkinteger(L, 3), loops = luaL_checkinteger(L, 4);
    luaL_argcheck(L, threads >= INT32_MIN && threads <= INT32_MAX, 1, "out of range");
    lua_Integer cut_at = luaL_optinteger(L, 5, 0);
    luaL_argcheck(L, cut_at >= 0 && cut_at <= INT32_MAX, 5, "out of range");
    luaL_argcheck(L, items >= 0 && items <= 1 << 20, 2, "out of range");
    count c = {.n_threads = (int)threads};
    c.hits = lua_newuserdatauv(L, (size_t)items + 1, 0);
    for (lua_Integer i = 0; i < items; i++) c.hits[i] = 0;
    err_info e;
    pool *p = pool_open((int)threads, &e);
    if (!p) return lml_fail(L, &e);
    cancel_flag cancel;
    atomic_init(&cancel, -(int)cut_at);
    if (cut_at) pool_watch(p, &cancel);
    for (lua_Integer i = 0; i < loops; i++) pool_for(p, items, grain, count_items, &c);
    int is_cut = pool_is_cut(p);
    pool_close(p);
    if (c.bad_worker) return luaL_error(L, "a worker's index is out of range");
    lua_pushlstring(L, (const char *)c.hits, (size_t)items);
    lua_pushboolean(L, is_cut);
    return 2;
}

/* core.bandwidth(threads, {bytes=, passes=}) -> bytes per second of each pass, a list */
static int measure_bandwidth(lua_State *L)
{
    static const char *const keys[] = {"bytes", "passes", NULL};
    enum { MAX_PASSES = 100 };
    double speeds[MAX_PASSES];
    lua_Integer threads = luaL_checkinteger(L, 1);
    lml_check_keys(L, 2, keys);
    lua_Integer n_bytes = lml_opt_int(L, 2, "bytes", 1 << 30);
    lua_Integer n_passes = lml_opt_int(L, 2, "passes", 5);
    luaL_argcheck(L, threads >= 1 && threads <= POOL_MAX_THREADS, 1, "out of range");
    luaL_argcheck(L, n_passes >= 1 && n_passes <= MAX_PASSES, 2, "passes: out of range");
    err_info e;
    pool *p = pool_open((int)threads, &e);
    if (!p) return lml_fail(L, &e);
    err_code code = bandwidth_measure(p, n_bytes, (int)n_passes, speeds, &e);
    pool_close(p);
    if (code) return lml_fail(L, &e);
    lua_createtable(L, (int)n_passes, 0);
    for (int i = 0; i < (int)n_passes; i++) {
        lua_pushnumber(L, speeds[i]);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

void lml_open_base(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"bandwidth", measure_bandwidth}, {"pool_counts", pool_counts}, {NULL, NULL}};
    luaL_setfuncs(L, functions, 0);
}
