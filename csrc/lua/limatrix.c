/* imatrix files for moonlet.imatrix, under the names that the files use. */
#include "lua/lml.h"

#include <string.h>

#include "io/imatrix.h"

#define SET "moonlet.imatrix_set"

static imx_set **to_set(lua_State *L)
{
    return luaL_checkudata(L, 1, SET);
}

/* Asked for again after whatever may run a finalizer, which may close it. */
static const imx_set *check_set(lua_State *L)
{
    imx_set **set = to_set(L);
    if (!*set) luaL_error(L, "imatrix is closed");
    return *set;
}

/* Element i of the table at `arg`, which keeps the string alive. */
static const char *string_at(lua_State *L, int arg, lua_Integer i)
{
    if (lua_rawgeti(L, arg, i) != LUA_TSTRING)
        luaL_error(L, "entry %I: string expected, got %s", i, luaL_typename(L, -1));
    const char *s = lua_tostring(L, -1);
    lua_pop(L, 1);
    return s;
}

static const char **string_list(lua_State *L, int arg, lua_Integer *n)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    *n = lml_len(L, arg, INT32_MAX);
    const char **list = lua_newuserdatauv(L, (size_t)*n * sizeof *list + 1, 0);
    for (lua_Integer i = 0; i < *n; i++) list[i] = string_at(L, arg, i + 1);
    return list;
}

/* imatrix_open({path, ...}) -> set */
static int set_open(lua_State *L)
{
    err_info e = {0};
    lua_Integer n;
    const char **paths = string_list(L, 1, &n);
    imx_set **set = lua_newuserdatauv(L, sizeof *set, 0);
    *set = NULL;
    luaL_setmetatable(L, SET);
    *set = imx_open(paths, n, &e);
    return *set ? 1 : lml_fail(L, &e);
}

static int set_close(lua_State *L)
{
    imx_set **set = to_set(L);
    imx_close(*set);
    *set = NULL;
    return 0;
}

/* set:names() -> sorted array */
static int set_names(lua_State *L)
{
    lua_newtable(L);
    for (int64_t i = 0; i < imx_count(check_set(L)); i++) {
        lua_pushstring(L, imx_at(check_set(L), i)->name);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

static void set_int(lua_State *L, const char *key, int64_t n)
{
    lua_pushinteger(L, n);
    lua_setfield(L, -2, key);
}

/* set:info() -> {datasets={...}, chunk_count=, chunk_size=} */
static int set_info(lua_State *L)
{
    lua_createtable(L, 0, 3);
    lua_newtable(L);
    for (int64_t i = 0; i < imx_n_datasets(check_set(L)); i++) {
        lua_pushstring(L, imx_dataset(check_set(L), i));
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "datasets");
    set_int(L, "chunk_count", imx_chunk_count(check_set(L)));
    set_int(L, "chunk_size", imx_chunk_size(check_set(L)));
    return 1;
}

static const imx_entry *check_entry(lua_State *L)
{
    const char *name = luaL_checkstring(L, 2);
    const imx_entry *t = imx_find(check_set(L), name);
    if (!t) luaL_error(L, "no entry %s", name);
    return t;
}

/* set:fits(name, n_in, n_mat) -> boolean, n_values, n_in (0 if the file does not say) */
static int set_fits(lua_State *L)
{
    const imx_entry *t = check_entry(L);
    lua_pushboolean(L, imx_fits(t, luaL_checkinteger(L, 3), luaL_checkinteger(L, 4)));
    lua_pushinteger(L, t->n_values);
    lua_pushinteger(L, t->n_in);
    return 3;
}

static const imx_entry *check_fitting(lua_State *L, lua_Integer *n_mat)
{
    const imx_entry *t = check_entry(L);
    *n_mat = luaL_checkinteger(L, 3);
    luaL_argcheck(L, *n_mat > 0 && imx_fits(t, t->n_values / *n_mat, *n_mat), 3, "does not fit");
    return t;
}

/* set:tokens(name, n_mat) -> {tokens that matrix 0 met, ...} */
static int set_tokens(lua_State *L)
{
    lua_Integer n_mat;
    check_fitting(L, &n_mat);
    lua_createtable(L, n_mat < INT32_MAX ? (int)n_mat : 0, 0);
    const imx_entry *t = check_fitting(L, &n_mat);
    for (lua_Integer m = 0; m < n_mat; m++) {
        lua_pushnumber(L, imx_tokens(t, n_mat, m));
        lua_rawseti(L, -2, m + 1);
    }
    return 1;
}

/* set:mean_squares(name, n_mat, mat) -> f32 bytes, tokens as in imatrix.h; mat from 0, or -1 */
static int set_mean_squares(lua_State *L)
{
    lua_Integer n_mat, mat = luaL_checkinteger(L, 4);
    const imx_entry *t = check_fitting(L, &n_mat);
    luaL_argcheck(L, mat >= -1 && mat < n_mat, 4, "no such matrix");
    luaL_Buffer b;
    size_t bytes = (size_t)(t->n_values / n_mat) * sizeof(float);
    float *out = (float *)(void *)luaL_buffinitsize(L, &b, bytes);
    t = check_fitting(L, &n_mat);
    double tokens = imx_mean_squares(t, n_mat, mat, out);
    luaL_pushresultsize(&b, bytes);
    lua_pushnumber(L, tokens);
    return 2;
}

/* imatrix_order_heads(f32 bytes, key_heads, per_key, dim, to_file) -> f32 bytes */
static int order_heads(lua_State *L)
{
    size_t bytes;
    const char *x = luaL_checklstring(L, 1, &bytes);
    lua_Integer key_heads = luaL_checkinteger(L, 2), per_key = luaL_checkinteger(L, 3);
    lua_Integer dim = luaL_checkinteger(L, 4), n;
    luaL_argcheck(L,
                  key_heads > 0 && per_key > 0 && dim > 0 &&
                      !__builtin_mul_overflow(key_heads, per_key, &n) &&
                      !__builtin_mul_overflow(n, dim, &n) && (size_t)n == bytes / sizeof(float) &&
                      bytes % sizeof(float) == 0,
                  1, "not as many floats");
    const float *from = lml_floats(L, x, bytes);
    luaL_Buffer b;
    float *out = (float *)(void *)luaL_buffinitsize(L, &b, bytes);
    imx_order_heads(from, key_heads, per_key, dim, lua_toboolean(L, 5), out);
    luaL_pushresultsize(&b, bytes);
    return 1;
}

/* ---- writing ---------------------------------------------------------------------------- */

/* Field `key` of the entry at the top of the table stack, n floats; NULL if absent and not needed.
 * Copies go into the table at `keep`. */
static const float *entry_floats(lua_State *L, int entry, int keep, const char *key, int64_t n,
                                 int needed)
{
    size_t bytes = 0;
    int type = lml_get(L, entry, key);
    if (type == LUA_TNIL && !needed) {
        lua_pop(L, 1);
        return NULL;
    }
    const char *s = type == LUA_TSTRING ? lua_tolstring(L, -1, &bytes) : NULL;
    if (!s || bytes / sizeof(float) != (size_t)n || bytes % sizeof(float))
        luaL_error(L, "field '%s': string of %I floats expected", key, (lua_Integer)n);
    lua_pop(L, 1);
    int top = lua_gettop(L);
    const float *floats = lml_floats(L, s, bytes);
    if (lua_gettop(L) > top) lua_rawseti(L, keep, (lua_Integer)lua_rawlen(L, keep) + 1);
    return floats;
}

static int64_t entry_int(lua_State *L, int entry, const char *key)
{
    int ok;
    lml_get(L, entry, key);
    lua_Integer n = lua_tointegerx(L, -1, &ok);
    if (!ok || n < 1 || n > INT32_MAX) luaL_error(L, "field '%s': size expected", key);
    lua_pop(L, 1);
    return n;
}

/* {name=, n_in=, n_mat=, sums2=, counts=, sums=} on top of the stack */
static void read_entry(lua_State *L, int keep, imx_entry *t)
{
    static const char *const keys[] = {"name", "n_in", "n_mat", "sums2", "counts", "sums", NULL};
    int entry = lua_gettop(L);
    luaL_checktype(L, entry, LUA_TTABLE);
    lml_check_keys(L, entry, keys);
    if (lml_get(L, entry, "name") != LUA_TSTRING) luaL_error(L, "field 'name': string expected");
    t->name = lua_tostring(L, -1);
    lua_pop(L, 1);
    t->n_in = entry_int(L, entry, "n_in");
    t->n_counts = entry_int(L, entry, "n_mat");
    t->n_values = t->n_in * t->n_counts;
    t->sums2 = entry_floats(L, entry, keep, "sums2", t->n_values, 1);
    t->counts = entry_floats(L, entry, keep, "counts", t->n_counts, 1);
    t->sums = entry_floats(L, entry, keep, "sums", t->n_values, 0);
}

/* imatrix_write(path, {entry, ...}, {datasets={...}, chunk_count=, chunk_size=}) -> true */
static int write_set(lua_State *L)
{
    static const char *const keys[] = {"datasets", "chunk_count", "chunk_size", NULL};
    err_info e = {0};
    const char *path = luaL_checkstring(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    luaL_checktype(L, 3, LUA_TTABLE);
    lua_settop(L, 3);
    lml_check_keys(L, 3, keys);
    lua_Integer chunk_count = lml_opt_int(L, 3, "chunk_count", 0);
    lua_Integer chunk_size = lml_opt_int(L, 3, "chunk_size", 0);
    luaL_argcheck(L,
                  chunk_count >= 0 && chunk_count <= UINT32_MAX && chunk_size >= 0 &&
                      chunk_size <= UINT32_MAX,
                  3, "counts of 32 bits expected");
    lml_get(L, 3, "datasets");
    lua_Integer n_datasets;
    const char **datasets = string_list(L, 4, &n_datasets);
    lua_Integer n = lml_len(L, 2, INT32_MAX);
    imx_entry *entries = lua_newuserdatauv(L, (size_t)n * sizeof *entries + 1, 0);
    lua_newtable(L);
    int keep = lua_gettop(L);
    for (lua_Integer i = 0; i < n; i++) {
        lua_rawgeti(L, 2, i + 1);
        read_entry(L, keep, &entries[i]);
        lua_pop(L, 1);
    }
    imx_meta meta = {.datasets = datasets,
                     .n_datasets = n_datasets,
                     .chunk_count = (uint32_t)chunk_count,
                     .chunk_size = (uint32_t)chunk_size};
    if (imx_write(path, entries, n, &meta, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

void lml_open_imatrix(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"names", set_names},
        {"info", set_info},
        {"fits", set_fits},
        {"tokens", set_tokens},
        {"mean_squares", set_mean_squares},
        {"close", set_close},
        {NULL, NULL},
    };
    static const luaL_Reg functions[] = {
        {"imatrix_open", set_open},
        {"imatrix_order_heads", order_heads},
        {"imatrix_write", write_set},
        {NULL, NULL},
    };
    lml_class(L, SET, methods, set_close);
    luaL_setfuncs(L, functions, 0);
}
