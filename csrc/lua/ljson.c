/* JSON text to Lua tables, and the two spellings that the Lua encoder needs. */
#include "lua/lml.h"

#include <math.h>
#include <string.h>

#include "io/json.h"

#define DOC "moonlet.json_doc"

/* Stack slots of json_value's arguments. */
enum { DOCUMENT = 1, ARRAY_META, OBJECT_META, ORDERS, FINITE };

/* The document is a userdata: Lua may run out of memory while tables are built from it. */
static int doc_gc(lua_State *L)
{
    json_doc **d = luaL_checkudata(L, 1, DOC);
    json_close(*d);
    *d = NULL;
    return 0;
}

static void push_value(lua_State *L, const json_value *v);

/* What takes the place of FINITE once a number is not. */
static void push_float(lua_State *L, double x)
{
    if (isinf(x) && lua_toboolean(L, FINITE)) {
        lua_pushnil(L);
        lua_replace(L, FINITE);
    }
    lua_pushnumber(L, x);
}

static void push_array(lua_State *L, const json_value *v)
{
    size_t n = json_length(v);
    lua_createtable(L, n > INT32_MAX ? INT32_MAX : (int)n, 0);
    for (size_t i = 0; i < n; i++) {
        push_value(L, json_at(v, i));
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    lua_pushvalue(L, ARRAY_META);
    lua_setmetatable(L, -2);
}

typedef struct members {
    lua_State *L;
    lua_Integer n;
} members;

static int push_member(void *ctx, const char *key, size_t key_bytes, json_value *v)
{
    members *m = ctx;
    lua_pushlstring(m->L, key, key_bytes);
    lua_pushvalue(m->L, -1);
    lua_rawseti(m->L, -3, ++m->n); /* keys[n] = key */
    push_value(m->L, v);
    lua_rawset(m->L, -4); /* object[key] = value */
    return 0;
}

static void push_object(lua_State *L, const json_value *v)
{
    int n = (int)json_length(v);
    members m = {L, 0};
    lua_createtable(L, 0, n);
    lua_createtable(L, n, 0);
    json_each(v, push_member, &m);
    lua_pushvalue(L, -2);
    lua_insert(L, -2);
    lua_rawset(L, ORDERS); /* orders[object] = keys */
    lua_pushvalue(L, OBJECT_META);
    lua_setmetatable(L, -2);
}

static void push_value(lua_State *L, const json_value *v)
{
    size_t n;
    const char *s;
    luaL_checkstack(L, 6, "JSON nesting");
    switch (json_type_of(v)) {
    case JSON_NULL: lua_pushlightuserdata(L, NULL); break;
    case JSON_BOOL: lua_pushboolean(L, json_bool(v, 0)); break;
    case JSON_INT: lua_pushinteger(L, json_int(v, 0)); break;
    case JSON_FLOAT: push_float(L, json_float(v, 0)); break;
    case JSON_STRING:
        s = json_string(v, &n);
        lua_pushlstring(L, s, n);
        break;
    case JSON_ARRAY: push_array(L, v); break;
    case JSON_OBJECT: push_object(L, v); break;
    }
}

/* json_parse(text, name, max_depth, max_values) -> document, to be closed */
static int l_parse(lua_State *L)
{
    size_t n;
    err_info e = {0};
    const char *text = luaL_checklstring(L, 1, &n), *name = luaL_checkstring(L, 2);
    lua_Integer depth = luaL_checkinteger(L, 3), values = luaL_checkinteger(L, 4);
    luaL_argcheck(L, values > 0, 4, "a positive number expected");
    json_doc **d = lua_newuserdatauv(L, sizeof *d, 0);
    *d = NULL;
    luaL_setmetatable(L, DOC);
    *d = json_parse_some(text, n, name, depth < 0 || depth > INT32_MAX ? 0 : (int)depth,
                         (size_t)values, &e);
    return *d ? 1 : lml_fail(L, &e);
}

/* json_value(document, array_meta, object_meta, orders, finite) -> value
 *
 * Every array gets array_meta; every object gets object_meta and orders[object] = {key, ...}. null
 * is the light userdata core.json_null. finite: nil when a number is beyond double precision. */
static int l_value(lua_State *L)
{
    json_doc **d = luaL_checkudata(L, DOCUMENT, DOC);
    luaL_argcheck(L, *d, DOCUMENT, "closed");
    for (int i = ARRAY_META; i <= ORDERS; i++) luaL_checktype(L, i, LUA_TTABLE);
    luaL_checktype(L, FINITE, LUA_TBOOLEAN);
    lua_settop(L, FINITE);
    push_value(L, json_root(*d));
    if (lua_isnil(L, FINITE)) lua_pushnil(L);
    return 1;
}

enum { QUOTE_BYTES = 1 << 16 };

/* How many of the n bytes at s are quoted at once: no character is cut. */
static size_t quote_bytes(const char *s, size_t n)
{
    size_t most = n < QUOTE_BYTES ? n : QUOTE_BYTES;
    for (size_t cut = most; cut < n && most - cut < 4; cut--)
        if (((unsigned char)s[cut] & 0xC0) != 0x80) return cut;
    return most;
}

/* json_quote(s, ascii) -> s in quotes, escaped. In pieces, as they may take six times as long. */
static int json_quote_string(lua_State *L)
{
    size_t n;
    luaL_Buffer b;
    const char *s = luaL_checklstring(L, 1, &n);
    int ascii = lua_toboolean(L, 2);
    luaL_buffinit(L, &b);
    luaL_addchar(&b, '"');
    while (n > 0) {
        size_t some = quote_bytes(s, n);
        char *out = luaL_prepbuffsize(&b, 6 * some + 2);
        size_t quoted = json_quote(out, s, some, ascii) - 2;
        memmove(out, out + 1, quoted);
        luaL_addsize(&b, quoted);
        s += some;
        n -= some;
    }
    luaL_addchar(&b, '"');
    luaL_pushresult(&b);
    return 1;
}

/* json_float(x) -> how Python spells the finite number */
static int json_float_string(lua_State *L)
{
    char out[JSON_FLOAT_BYTES];
    double x = luaL_checknumber(L, 1);
    luaL_argcheck(L, isfinite(x), 1, "finite number expected");
    lua_pushlstring(L, out, json_float_text(out, x));
    return 1;
}

void lml_open_json(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"json_parse", l_parse},
        {"json_value", l_value},
        {"json_quote", json_quote_string},
        {"json_float", json_float_string},
        {NULL, NULL},
    };
    static const luaL_Reg no_methods[] = {{NULL, NULL}};
    lml_class(L, DOC, no_methods, doc_gc);
    luaL_setfuncs(L, functions, 0);
    lua_pushlightuserdata(L, NULL);
    lua_setfield(L, -2, "json_null");
}
