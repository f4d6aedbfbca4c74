/* Safetensors sets for scripts: names, facts and bytes of tensors, and one-file writing. */
#include "lua/lml.h"

#include <string.h>

#include "io/st.h"

#define SET "moonlet.st_set"

static st_set **to_set(lua_State *L)
{
    return luaL_checkudata(L, 1, SET);
}

static const st_set *check_set(lua_State *L)
{
    st_set **set = to_set(L);
    if (!*set) luaL_error(L, "safetensors set is closed");
    return *set;
}

/* st_open(path) -> set */
static int set_open(lua_State *L)
{
    err_info e = {0};
    const char *path = luaL_checkstring(L, 1);
    st_set **set = lua_newuserdatauv(L, sizeof *set, 0);
    *set = NULL;
    luaL_setmetatable(L, SET);
    *set = st_open(path, &e);
    return *set ? 1 : lml_fail(L, &e);
}

static int set_close(lua_State *L)
{
    st_set **set = to_set(L);
    st_close(*set);
    *set = NULL;
    return 0;
}

/* set:names() -> sorted array */
static int set_names(lua_State *L)
{
    const st_set *set = check_set(L);
    int64_t n = st_count(set);
    lua_createtable(L, n > INT32_MAX ? INT32_MAX : (int)n, 0);
    for (int64_t i = 0; i < n; i++) {
        lua_pushstring(L, st_at(set, i)->name);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

/* set:info(name) -> {dtype=, shape=, bytes=, file=, offset=} or nil */
static int set_info(lua_State *L)
{
    const st_tensor *t = st_find(check_set(L), luaL_checkstring(L, 2));
    if (!t) return 0;
    lua_createtable(L, 0, 5);
    lua_pushstring(L, st_dtype_name(t->dtype));
    lua_setfield(L, -2, "dtype");
    lua_createtable(L, t->n_dims, 0);
    for (int i = 0; i < t->n_dims; i++) {
        lua_pushinteger(L, t->shape[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "shape");
    lua_pushinteger(L, t->n_bytes);
    lua_setfield(L, -2, "bytes");
    lua_pushstring(L, t->file);
    lua_setfield(L, -2, "file");
    lua_pushinteger(L, t->offset);
    lua_setfield(L, -2, "offset");
    return 1;
}

/* set:read(name [, at [, n_bytes]]) -> bytes; all from `at` (0) on without n_bytes. A name that is
 * not there is the caller's to know, as a range is: both raise. */
static int set_read(lua_State *L)
{
    const st_set *set = check_set(L);
    const char *name = luaL_checkstring(L, 2);
    const st_tensor *t = st_find(set, name);
    if (!t) return luaL_error(L, "no tensor %s", name);
    lua_Integer at = luaL_optinteger(L, 3, 0);
    luaL_argcheck(L, at >= 0 && at <= t->n_bytes, 3, "outside the tensor");
    lua_Integer n = luaL_optinteger(L, 4, t->n_bytes - at);
    luaL_argcheck(L, n >= 0 && n <= t->n_bytes - at, 4, "outside the tensor");
    lua_pushlstring(L, (const char *)t->data + at, (size_t)n);
    return 1;
}

/* set:metadata(key) -> string or nil */
static int set_metadata(lua_State *L)
{
    lua_pushstring(L, st_metadata(check_set(L), luaL_checkstring(L, 2)));
    return 1;
}

/* ---- writing ---------------------------------------------------------------------------- */

static void read_shape(lua_State *L, int arg, st_entry *t)
{
    if (lml_get(L, arg, "shape") != LUA_TTABLE)
        luaL_error(L, "tensor %s: field 'shape' is not a table", t->name);
    lua_Unsigned n = lua_rawlen(L, -1);
    if (n > ST_MAX_DIMS) luaL_error(L, "tensor %s: more than %d dimensions", t->name, ST_MAX_DIMS);
    t->n_dims = (int)n;
    for (int d = 0; d < t->n_dims; d++) {
        int ok;
        lua_rawgeti(L, -1, d + 1);
        t->shape[d] = lua_tointegerx(L, -1, &ok);
        if (!ok || t->shape[d] < 0) luaL_error(L, "tensor %s: shape is no list of sizes", t->name);
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
}

static const char *field_string(lua_State *L, int entry, const char *key, size_t *n, lua_Integer i)
{
    if (lml_get(L, entry, key) != LUA_TSTRING)
        luaL_error(L, "entry %I: field '%s' is not a string", i, key);
    const char *s = lua_tolstring(L, -1, n);
    lua_pop(L, 1);
    return s;
}

void lml_check_entry(lua_State *L, int arg, lua_Integer i, st_entry *t)
{
    if (!lua_istable(L, arg)) luaL_error(L, "entry %I is not a table", i);
    t->name = field_string(L, arg, "name", NULL, i);
    const char *dtype_name = field_string(L, arg, "dtype", NULL, i);
    int dtype = st_dtype_parse(dtype_name);
    if (dtype < 0) luaL_error(L, "tensor %s: unknown dtype '%s'", t->name, dtype_name);
    t->dtype = (st_dtype)dtype;
    read_shape(L, arg, t);
}

/* {name=, dtype=, shape=, data=} at the top of the stack; *data is borrowed from it. */
static void read_entry(lua_State *L, lua_Integer i, st_entry *t, const char **data, size_t *n_bytes)
{
    static const char *const keys[] = {"name", "dtype", "shape", "data", NULL};
    int entry = lua_gettop(L);
    lml_check_entry(L, entry, i, t);
    lml_check_keys(L, entry, keys);
    *data = field_string(L, entry, "data", n_bytes, i);
    lua_Integer expected = st_dtype_bytes(t->dtype);
    for (int d = 0; d < t->n_dims; d++)
        if (__builtin_mul_overflow(expected, t->shape[d], &expected)) expected = -1;
    if (expected < 0 || (size_t)expected != *n_bytes)
        luaL_error(L, "tensor %s: %I bytes of data do not fit dtype and shape", t->name,
                   (lua_Integer)*n_bytes);
}

/* Sorted key, value, ..., NULL in a userdata left on the stack; the strings stay in the table. */
static const char *const *read_metadata(lua_State *L, int arg)
{
    size_t n = 0;
    if (lua_isnoneornil(L, arg)) return NULL;
    luaL_checktype(L, arg, LUA_TTABLE);
    for (lua_pushnil(L); lua_next(L, arg); lua_pop(L, 1)) {
        if (lua_type(L, -2) != LUA_TSTRING || lua_type(L, -1) != LUA_TSTRING)
            luaL_error(L, "metadata: keys and values must be strings");
        n++;
    }
    const char **list = lua_newuserdatauv(L, (2 * n + 1) * sizeof *list, 0);
    size_t used = 0;
    for (lua_pushnil(L); lua_next(L, arg); lua_pop(L, 1)) {
        size_t i = used++;
        const char *key = lua_tostring(L, -2), *value = lua_tostring(L, -1);
        for (; i > 0 && strcmp(list[2 * (i - 1)], key) > 0; i--) {
            list[2 * i] = list[2 * (i - 1)];
            list[2 * i + 1] = list[2 * i - 1];
        }
        list[2 * i] = key;
        list[2 * i + 1] = value;
    }
    list[2 * n] = NULL;
    return list;
}

/* st_write(path, {{name=, dtype=, shape=, data=}, ...} [, metadata]) -> true */
static int write_file(lua_State *L)
{
    err_info e = {0};
    const char *path = luaL_checkstring(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_settop(L, 3);
    lua_Integer n = lml_len(L, 2, INT32_MAX);
    const char *const *metadata = read_metadata(L, 3);
    lua_settop(L, metadata ? 4 : 3);
    st_entry *entries = lua_newuserdatauv(L, (size_t)n * sizeof *entries + 1, 0);
    const char **data = lua_newuserdatauv(L, (size_t)n * sizeof *data + 1, 0);
    size_t *n_bytes = lua_newuserdatauv(L, (size_t)n * sizeof *n_bytes + 1, 0);
    for (lua_Integer i = 0; i < n; i++) {
        lua_rawgeti(L, 2, i + 1);
        read_entry(L, i + 1, &entries[i], &data[i], &n_bytes[i]);
        lua_pop(L, 1);
    }
    /* Nothing below can raise, so the writer cannot be lost. */
    st_writer *w = st_writer_open(path, entries, n, metadata, &e);
    if (!w) return lml_fail(L, &e);
    for (lua_Integer i = 0; i < n; i++) {
        if (st_writer_put(w, i, 0, data[i], (int64_t)n_bytes[i], &e)) {
            st_writer_abort(w);
            return lml_fail(L, &e);
        }
    }
    if (st_writer_finish(w, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

void lml_open_st(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"names", set_names},       {"info", set_info},   {"read", set_read},
        {"metadata", set_metadata}, {"close", set_close}, {NULL, NULL},
    };
    static const luaL_Reg functions[] = {
        {"st_open", set_open},
        {"st_write", write_file},
        {NULL, NULL},
    };
    lml_class(L, SET, methods, set_close);
    luaL_setfuncs(L, functions, 0);
}
