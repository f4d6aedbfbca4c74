/* moonlet.core: OpenBLAS as calibration uses it, for specs and for asking whether it is there. */
#include "lua/lml.h"

#include <string.h>

#include "base/pool.h"
#include "kern/blas.h"

/* Sides of the matrices that specs use. */
enum { MAX_SIDE = 4096 };

/* blas() -> the name of the kernels in use; nil, message, "unsupported" without OpenBLAS */
static int load(lua_State *L)
{
    blas b;
    err_info e;
    if (blas_load(&b, &e)) return lml_fail(L, &e);
    lua_pushstring(L, b.core);
    return 1;
}

/* Pushes a tensor [rows, cols] that holds the bytes of `values`. */
static float *push_matrix(lua_State *L, const char *values, size_t n_bytes, int64_t rows,
                          int64_t cols)
{
    if (n_bytes != (size_t)(rows * cols) * sizeof(float))
        luaL_error(L, "matrix of %I x %I f32 expected", (LUAI_UACINT)rows, (LUAI_UACINT)cols);
    float *m = lml_push_tensor(L, 'f', 2, (int64_t[]){rows, cols});
    memcpy(m, values, n_bytes);
    return m;
}

/* blas_gram({ {x=bytes, n=, cols=}, ... }, threads) -> { tensor [cols,cols], ... } = X^T X */
static int gram(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    lua_Integer n_threads = luaL_checkinteger(L, 2);
    int n_jobs = (int)lml_len(L, 1, 1024);
    luaL_argcheck(L, n_threads >= 1 && n_threads <= POOL_MAX_THREADS, 2, "1 to 1024 expected");
    blas b;
    err_info e;
    if (blas_load(&b, &e)) return lml_fail(L, &e);
    blas_gram_job *jobs = lua_newuserdatauv(L, (size_t)n_jobs * sizeof *jobs + 1, 0);
    lua_createtable(L, n_jobs, 0);
    for (int j = 0; j < n_jobs; j++) {
        if (lua_rawgeti(L, 1, j + 1) != LUA_TTABLE)
            return luaL_error(L, "job %d: not a table", j + 1);
        int at = lua_absindex(L, -1);
        int64_t n = lml_opt_int(L, at, "n", 0), cols = lml_opt_int(L, at, "cols", 0);
        size_t n_bytes;
        if (lml_get(L, at, "x") != LUA_TSTRING || cols < 1 || cols > MAX_SIDE || n < 0 ||
            n > MAX_SIDE)
            return luaL_error(L, "job %d: x, n and cols expected", j + 1);
        const char *values = lua_tolstring(L, -1, &n_bytes);
        const float *x = push_matrix(L, values, n_bytes, n, cols);
        lua_rawseti(L, -4, n_jobs + j + 1); /* keeps it alive */
        float *h = lml_push_tensor(L, 'f', 2, (int64_t[]){cols, cols});
        lua_rawseti(L, -4, j + 1);
        jobs[j] = (blas_gram_job){x, n, cols, h};
        lua_pop(L, 2);
    }
    pool *p = pool_open((int)n_threads, &e);
    if (!p) return lml_fail(L, &e);
    blas_gram(&b, p, jobs, n_jobs);
    for (int j = 0; j < n_jobs; j++) blas_mirror(p, jobs[j].h, jobs[j].cols);
    pool_close(p);
    for (int j = 1; j <= n_jobs; j++) {
        lua_pushnil(L);
        lua_rawseti(L, -2, n_jobs + j);
    }
    return 1;
}

void lml_open_blas(lua_State *L)
{
    static const luaL_Reg functions[] = {{"blas", load}, {"blas_gram", gram}, {NULL, NULL}};
    luaL_setfuncs(L, functions, 0);
}
