/* moonlet.core: the module table. Private to the Lua side; scripts use moonlet. */
#include "lua/lml.h"

#include <string.h>

int lml_fail(lua_State *L, const err_info *e)
{
    lua_pushnil(L);
    lua_pushstring(L, e->text);
    lua_pushstring(L, err_name(e->code));
    return 3;
}

void lml_class(lua_State *L, const char *name, const luaL_Reg *methods, lua_CFunction gc)
{
    luaL_newmetatable(L, name);
    lua_newtable(L);
    luaL_setfuncs(L, methods, 0);
    lua_setfield(L, -2, "__index");
    lua_pushcfunction(L, gc);
    lua_setfield(L, -2, "__gc");
    lua_pushcfunction(L, gc);
    lua_setfield(L, -2, "__close");
    lua_pop(L, 1);
}

void lml_check_keys(lua_State *L, int arg, const char *const *keys)
{
    if (lua_isnoneornil(L, arg)) return;
    luaL_checktype(L, arg, LUA_TTABLE);
    lua_pushnil(L);
    while (lua_next(L, arg)) {
        lua_pop(L, 1);
        const char *const *k = keys;
        if (lua_type(L, -1) == LUA_TSTRING)
            while (*k && strcmp(*k, lua_tostring(L, -1)) != 0) k++;
        else
            while (*k) k++;
        if (!*k) luaL_error(L, "unknown option '%s'", luaL_tolstring(L, -1, NULL));
    }
}

int lml_get(lua_State *L, int table, const char *key)
{
    table = lua_absindex(L, table);
    lua_pushstring(L, key);
    return lua_rawget(L, table);
}

lua_Integer lml_len(lua_State *L, int table, int max)
{
    lua_Unsigned n = lua_rawlen(L, table);
    if (n > (lua_Unsigned)max) luaL_error(L, "a table of more than %d entries", max);
    return (lua_Integer)n;
}

/* Pushes options[key]; 0 and nothing pushed when it is absent. */
static int push_option(lua_State *L, int arg, const char *key)
{
    if (lua_isnoneornil(L, arg)) return 0;
    if (lml_get(L, arg, key) != LUA_TNIL) return 1;
    lua_pop(L, 1);
    return 0;
}

lua_Integer lml_opt_int(lua_State *L, int arg, const char *key, lua_Integer fallback)
{
    if (!push_option(L, arg, key)) return fallback;
    int ok;
    lua_Integer n = lua_tointegerx(L, -1, &ok);
    if (!ok) luaL_error(L, "option '%s': integer expected, got %s", key, luaL_typename(L, -1));
    lua_pop(L, 1);
    return n;
}

lua_Number lml_opt_number(lua_State *L, int arg, const char *key, lua_Number fallback)
{
    if (!push_option(L, arg, key)) return fallback;
    int ok;
    lua_Number n = lua_tonumberx(L, -1, &ok);
    if (!ok) luaL_error(L, "option '%s': number expected, got %s", key, luaL_typename(L, -1));
    lua_pop(L, 1);
    return n;
}

int lml_opt_bool(lua_State *L, int arg, const char *key, int fallback)
{
    if (!push_option(L, arg, key)) return fallback;
    if (!lua_isboolean(L, -1))
        luaL_error(L, "option '%s': boolean expected, got %s", key, luaL_typename(L, -1));
    int b = lua_toboolean(L, -1);
    lua_pop(L, 1);
    return b;
}

const char *lml_opt_string(lua_State *L, int arg, const char *key, const char *fallback)
{
    if (!push_option(L, arg, key)) return fallback;
    if (lua_type(L, -1) != LUA_TSTRING)
        luaL_error(L, "option '%s': string expected, got %s", key, luaL_typename(L, -1));
    const char *s = lua_tostring(L, -1); /* the table keeps it alive */
    lua_pop(L, 1);
    return s;
}

const float *lml_floats(lua_State *L, const char *bytes, size_t n_bytes)
{
    if ((uintptr_t)bytes % _Alignof(float) == 0) return (const float *)(const void *)bytes;
    return memcpy(lua_newuserdatauv(L, n_bytes + 1, 0), bytes, n_bytes);
}

const int32_t *lml_check_ids(lua_State *L, int arg, int64_t *n)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    lua_Integer len = lml_len(L, arg, INT32_MAX);
    int32_t *ids = lua_newuserdatauv(L, (size_t)len * sizeof *ids + 1, 0);
    for (lua_Integer i = 1; i <= len; i++) {
        int ok;
        lua_rawgeti(L, arg, i);
        lua_Integer id = lua_tointegerx(L, -1, &ok);
        if (!ok || id < INT32_MIN || id > INT32_MAX)
            luaL_error(L, "bad argument #%d: entry %I is not a token id", arg, i);
        ids[i - 1] = (int32_t)id;
        lua_pop(L, 1);
    }
    *n = len;
    return ids;
}

void lml_push_ids(lua_State *L, const int32_t *ids, int64_t n)
{
    lua_createtable(L, (int)n, 0);
    for (int64_t i = 0; i < n; i++) {
        lua_pushinteger(L, ids[i]);
        lua_rawseti(L, -2, i + 1);
    }
}

const int32_t *lml_check_sequences(lua_State *L, int arg, int64_t **first, int64_t *n_sequences)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    lua_Integer n = lml_len(L, arg, INT32_MAX), total = 0;
    int64_t *starts = lua_newuserdatauv(L, (size_t)(n + 1) * sizeof *starts, 0);
    starts[0] = 0;
    for (lua_Integer i = 1; i <= n; i++) {
        if (lua_rawgeti(L, arg, i) != LUA_TTABLE)
            luaL_error(L, "sequence %I: list of token ids expected, got %s", (LUAI_UACINT)i,
                       luaL_typename(L, -1));
        starts[i] = total += lml_len(L, -1, INT32_MAX);
        lua_pop(L, 1);
    }
    int32_t *ids = lua_newuserdatauv(L, (size_t)total * sizeof *ids + 1, 0);
    for (lua_Integer i = 1; i <= n; i++) {
        lua_rawgeti(L, arg, i);
        int64_t count;
        const int32_t *from = lml_check_ids(L, lua_gettop(L), &count);
        if (count != starts[i] - starts[i - 1])
            luaL_error(L, "sequence %I changed", (LUAI_UACINT)i);
        memcpy(ids + starts[i - 1], from, (size_t)count * sizeof *ids);
        lua_pop(L, 2);
    }
    *first = starts;
    *n_sequences = n;
    return ids;
}

__attribute__((visibility("default"))) int luaopen_moonlet_core(lua_State *L);

int luaopen_moonlet_core(lua_State *L)
{
    lua_newtable(L);
    lml_open_awq(L);
    lml_open_base(L);
    lml_open_blas(L);
    lml_open_cands(L);
    lml_open_file(L);
    lml_open_ids(L);
    lml_open_imatrix(L);
    lml_open_journal(L);
    lml_open_json(L);
    lml_open_kern(L);
    lml_open_kld(L);
    lml_open_layout(L);
    lml_open_logits(L);
    lml_open_model(L);
    lml_open_net(L);
    lml_open_num(L);
    lml_open_process(L);
    lml_open_quant(L);
    lml_open_rng(L);
    lml_open_sandbox(L);
    lml_open_st(L);
    lml_open_sys(L);
    lml_open_tensor(L);
    lml_open_tok(L);
    lml_open_turn(L);
    lml_open_watch(L);
    return 1;
}
