/* Token ids, and other integers, in four bytes each: class moonlet.ids. A Lua table takes sixteen
 * to thirty-two, which is too much for what a text of megabytes becomes. */
#include "lua/lml.h"

#include <string.h>

#define IDS "moonlet.ids"

/* What it holds is a userdata of its own, in the user value: the collector knows its size. */
typedef struct ids_box {
    int32_t *data;
    size_t n, room;
} ids_box;

static ids_box *check_ids(lua_State *L, int arg)
{
    return luaL_checkudata(L, arg, IDS);
}

static ids_box *push_new(lua_State *L)
{
    ids_box *box = lua_newuserdatauv(L, sizeof *box, 1);
    *box = (ids_box){NULL, 0, 0};
    luaL_setmetatable(L, IDS);
    return box;
}

/* Room for `more` behind what is there; a list that is empty gets no more than it needs. */
static void reserve(lua_State *L, int arg, ids_box *box, size_t more)
{
    if (more <= box->room - box->n) return;
    if (more > (size_t)INT32_MAX - box->n) luaL_error(L, "more than %d ids", INT32_MAX);
    size_t room = box->n + more, grown = box->n + box->n / 2;
    if (room < grown) room = grown;
    int32_t *data = lua_newuserdatauv(L, room * sizeof *data, 0);
    if (box->n) memcpy(data, box->data, box->n * sizeof *data);
    box->data = data;
    box->room = room;
    lua_setiuservalue(L, arg, 1);
}

const int32_t *lml_to_ids(lua_State *L, int arg, size_t *n)
{
    ids_box *box = luaL_testudata(L, arg, IDS);
    if (!box) return NULL;
    *n = box->n;
    return box->n ? box->data : (const int32_t *)"";
}

void lml_push_id_list(lua_State *L, const int32_t *ids, size_t n)
{
    ids_box *box = push_new(L);
    reserve(L, lua_gettop(L), box, n);
    if (n) memcpy(box->data, ids, n * sizeof *ids);
    box->n = n;
}

/* core.ids() -> list, empty */
static int new_ids(lua_State *L)
{
    push_new(L);
    return 1;
}

/* list:append(ids): a table or another list; or one integer */
static int append(lua_State *L)
{
    ids_box *box = check_ids(L, 1);
    size_t n;
    int32_t one;
    const int32_t *more = lml_to_ids(L, 2, &n);
    if (lua_isinteger(L, 2)) {
        lua_Integer id = lua_tointeger(L, 2);
        luaL_argcheck(L, id >= INT32_MIN && id <= INT32_MAX, 2, "out of range");
        one = (int32_t)id;
        more = &one;
        n = 1;
    } else if (!more) {
        int64_t len;
        more = lml_check_ids(L, 2, &len);
        n = (size_t)len;
    }
    reserve(L, 1, box, n);
    if (lua_rawequal(L, 1, 2)) more = box->data; /* it may have moved */
    if (n) memcpy(box->data + box->n, more, n * sizeof *more);
    box->n += n;
    return 0;
}

static int length(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)check_ids(L, 1)->n);
    return 1;
}

/* list:slice(first, last) -> table of those there are */
static int slice(lua_State *L)
{
    ids_box *box = check_ids(L, 1);
    lua_Integer n = (lua_Integer)box->n, first = luaL_optinteger(L, 2, 1),
                last = luaL_optinteger(L, 3, n);
    if (first < 1) first = 1;
    if (last > n) last = n;
    if (first > last) {
        lua_newtable(L);
        return 1;
    }
    lml_push_ids(L, box->data + first - 1, last - first + 1);
    return 1;
}

/* Empties the list. */
static int close_ids(lua_State *L)
{
    *check_ids(L, 1) = (ids_box){NULL, 0, 0};
    lua_pushnil(L);
    lua_setiuservalue(L, 1, 1);
    return 0;
}

void lml_open_ids(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"append", append}, {"close", close_ids}, {"slice", slice}, {NULL, NULL}};
    lml_class(L, IDS, methods, close_ids);
    luaL_getmetatable(L, IDS);
    lua_pushcfunction(L, length);
    lua_setfield(L, -2, "__len");
    lua_pop(L, 1);
    lua_pushcfunction(L, new_ids);
    lua_setfield(L, -2, "ids");
}
