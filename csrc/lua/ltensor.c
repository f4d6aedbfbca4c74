/* moonlet.tensor: numbers that Lua did not compute, row major, read only from Lua.
 *
 * Positions are 1-based, as everywhere in Lua; what is inside an i32 tensor (token ids, experts)
 * stays 0-based. */
#include "lua/lml.h"

#include <stdint.h>
#include <string.h>

#include "base/mem.h"

enum { MAX_DIMS = 8 };

typedef struct tensor {
    void *data;     /* NULL: closed */
    uint64_t epoch; /* row views are good while this stays as it was */
    int64_t n;      /* elements */
    int64_t shape[MAX_DIMS];
    int n_dims;
    char dtype;
} tensor;

static const char CLASS[] = "moonlet.tensor";

static tensor *check(lua_State *L, int arg)
{
    tensor *t = luaL_checkudata(L, arg, CLASS);
    if (!t->data) luaL_error(L, "tensor is closed");
    return t;
}

void *lml_push_tensor(lua_State *L, char dtype, int n_dims, const int64_t *shape)
{
    if (n_dims < 1 || n_dims > MAX_DIMS) luaL_error(L, "tensor of %d dimensions", n_dims);
    tensor *t = lua_newuserdatauv(L, sizeof *t, 0);
    *t = (tensor){.n = 1, .n_dims = n_dims, .dtype = dtype};
    luaL_setmetatable(L, CLASS);
    for (int d = 0; d < n_dims; d++) {
        t->shape[d] = shape[d];
        if (shape[d] < 0 || __builtin_mul_overflow(t->n, shape[d], &t->n))
            luaL_error(L, "tensor shape does not fit in memory");
    }
    err_info e;
    t->data = mem_array((size_t)t->n, sizeof(float), &e);
    if (!t->data) luaL_error(L, "%s", e.text);
    return t->data;
}

const float *lml_check_rows(lua_State *L, int arg, int64_t *rows, int64_t *cols)
{
    const tensor *t = check(L, arg);
    luaL_argcheck(L, t->n_dims == 2 && t->dtype == 'f', arg, "2-D f32 tensor expected");
    *rows = t->shape[0];
    *cols = t->shape[1];
    return t->data;
}

static int tensor_gc(lua_State *L)
{
    tensor *t = luaL_checkudata(L, 1, CLASS);
    void *data = t->data;
    t->data = NULL;
    t->epoch++;
    mem_free(data);
    return 0;
}

static int tensor_shape(lua_State *L)
{
    tensor *t = check(L, 1);
    lua_createtable(L, t->n_dims, 0);
    for (int d = 0; d < t->n_dims; d++) {
        lua_pushinteger(L, t->shape[d]);
        lua_rawseti(L, -2, d + 1);
    }
    return 1;
}

static int tensor_dtype(lua_State *L)
{
    lua_pushstring(L, check(L, 1)->dtype == 'f' ? "f32" : "i32");
    return 1;
}

static int tensor_len(lua_State *L)
{
    lua_pushinteger(L, check(L, 1)->shape[0]);
    return 1;
}

static int tensor_bytes(lua_State *L)
{
    tensor *t = check(L, 1);
    lua_pushlstring(L, t->data, (size_t)t->n * sizeof(float));
    return 1;
}

static int64_t check_index(lua_State *L, int arg, int64_t n)
{
    lua_Integer i = luaL_checkinteger(L, arg);
    if (i < 1 || i > n)
        luaL_argerror(L, arg, lua_pushfstring(L, "index %I is not in 1..%I", i, (lua_Integer)n));
    return i - 1;
}

static int tensor_at(lua_State *L)
{
    tensor *t = check(L, 1);
    if (lua_gettop(L) != 1 + t->n_dims)
        luaL_error(L, "tensor of %d dimensions needs as many indices", t->n_dims);
    int64_t offset = 0;
    for (int d = 0; d < t->n_dims; d++)
        offset = offset * t->shape[d] + check_index(L, 2 + d, t->shape[d]);
    if (t->dtype == 'f')
        lua_pushnumber(L, ((const float *)t->data)[offset]);
    else
        lua_pushinteger(L, ((const int32_t *)t->data)[offset]);
    return 1;
}

static int tensor_row(lua_State *L)
{
    tensor *t = check(L, 1);
    if (t->n_dims != 2 || t->dtype != 'f') luaL_error(L, "row() needs a 2-D f32 tensor");
    int64_t i = check_index(L, 2, t->shape[0]);
    lml_push_logits(L, (float *)t->data + i * t->shape[1], t->shape[1], &t->epoch, 1);
    return 1;
}

static int tensor_tostring(lua_State *L)
{
    tensor *t = luaL_checkudata(L, 1, CLASS);
    luaL_Buffer b;
    luaL_buffinit(L, &b);
    luaL_addstring(&b, t->dtype == 'f' ? "tensor f32" : "tensor i32");
    for (int d = 0; d < t->n_dims; d++) {
        lua_pushfstring(L, d ? "x%I" : " %I", (lua_Integer)t->shape[d]);
        luaL_addvalue(&b);
    }
    if (!t->data) luaL_addstring(&b, " (closed)");
    luaL_pushresult(&b);
    return 1;
}

/* core.tensor(dtype, shape, bytes): what specs and Lua code with own numbers start from. */
static int tensor_new(lua_State *L)
{
    static const char *const dtypes[] = {"f32", "i32", NULL};
    char dtype = luaL_checkoption(L, 1, NULL, dtypes) ? 'i' : 'f';
    size_t n_bytes;
    luaL_checktype(L, 2, LUA_TTABLE);
    const char *bytes = luaL_checklstring(L, 3, &n_bytes);
    int64_t shape[MAX_DIMS];
    lua_Unsigned n_dims = lua_rawlen(L, 2);
    luaL_argcheck(L, n_dims >= 1 && n_dims <= MAX_DIMS, 2, "1 to 8 dimensions expected");
    for (int d = 0; d < (int)n_dims; d++) {
        int ok;
        lua_rawgeti(L, 2, d + 1);
        shape[d] = lua_tointegerx(L, -1, &ok);
        luaL_argcheck(L, ok && shape[d] >= 0, 2, "sizes expected");
        lua_pop(L, 1);
    }
    void *data = lml_push_tensor(L, dtype, (int)n_dims, shape);
    tensor *t = lua_touserdata(L, -1);
    luaL_argcheck(L, n_bytes == (size_t)t->n * sizeof(float), 3, "length does not fit the shape");
    memcpy(data, bytes, n_bytes);
    return 1;
}

void lml_open_tensor(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"at", tensor_at},   {"bytes", tensor_bytes}, {"close", tensor_gc}, {"dtype", tensor_dtype},
        {"row", tensor_row}, {"shape", tensor_shape}, {NULL, NULL},
    };
    lml_class(L, CLASS, methods, tensor_gc);
    luaL_getmetatable(L, CLASS);
    lua_pushcfunction(L, tensor_len);
    lua_setfield(L, -2, "__len");
    lua_pushcfunction(L, tensor_tostring);
    lua_setfield(L, -2, "__tostring");
    lua_pop(L, 1);
    lua_pushcfunction(L, tensor_new);
    lua_setfield(L, -2, "tensor");
}
