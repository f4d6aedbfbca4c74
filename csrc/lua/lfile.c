/* Directories and whole files for scripts. */
#include "lua/lml.h"

#include <stdlib.h>

#include "io/file.h"
#include "io/hash.h"

/* file_write(path, bytes) -> true */
static int write_whole(lua_State *L)
{
    size_t n;
    err_info e = {0};
    const char *path = luaL_checkstring(L, 1), *data = luaL_checklstring(L, 2, &n);
    if (file_write(path, data, n, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* make_dir(path) -> true */
static int make_dir(lua_State *L)
{
    err_info e = {0};
    if (file_make_dir(luaL_checkstring(L, 1), &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* sync_dir(path) -> true */
static int sync_dir(lua_State *L)
{
    err_info e = {0};
    if (file_sync_dir(luaL_checkstring(L, 1), &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* An open directory must not be lost to a Lua error, so names are collected in C first. */
typedef struct names {
    char *text; /* 'f' or '-', then the name and NUL, repeated */
    size_t n, cap;
} names;

static int collect(void *ctx, const char *name, int is_file)
{
    names *list = ctx;
    for (const char *c = name;; c++) {
        if (list->n + 2 > list->cap) {
            size_t cap = list->cap ? 2 * list->cap : 1024;
            char *grown = realloc(list->text, cap);
            if (!grown) return 1;
            list->text = grown;
            list->cap = cap;
        }
        if (c == name) list->text[list->n++] = is_file ? 'f' : '-';
        list->text[list->n++] = *c;
        if (!*c) return 0;
    }
}

/* list_dir(path) -> {name = is_file, ...} */
static int list_dir(lua_State *L)
{
    err_info e = {0};
    names list = {0};
    err_code code = file_list(luaL_checkstring(L, 1), collect, &list, &e);
    if (code == ERR_CANCELLED) err_set(&e, ERR_MEMORY, "out of memory for a list of files");
    if (code) {
        free(list.text);
        return lml_fail(L, &e);
    }
    char *copy = lua_newuserdatauv(L, list.n + 1, 0);
    for (size_t i = 0; i < list.n; i++) copy[i] = list.text[i];
    free(list.text);
    lua_newtable(L);
    for (size_t i = 0; i < list.n;) {
        lua_pushboolean(L, copy[i] == 'f');
        lua_setfield(L, -2, copy + i + 1);
        while (copy[i++]) continue;
    }
    return 1;
}

/* free_bytes(path) -> integer */
static int free_bytes(lua_State *L)
{
    err_info e = {0};
    int64_t n = file_free_bytes(luaL_checkstring(L, 1), &e);
    if (n < 0) return lml_fail(L, &e);
    lua_pushinteger(L, n);
    return 1;
}

/* check_free(path) -> true: nobody has path .. ".partial" */
static int check_free(lua_State *L)
{
    err_info e = {0};
    if (file_check_free(luaL_checkstring(L, 1), &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* reserve(path, bytes) -> true: a file that takes so much of the disk */
static int reserve(lua_State *L)
{
    err_info e = {0};
    lua_Integer n = luaL_checkinteger(L, 2);
    luaL_argcheck(L, n > 0, 2, "bytes expected");
    if (file_reserve(luaL_checkstring(L, 1), n, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* check_writable(directory) -> true */
static int check_writable(lua_State *L)
{
    err_info e = {0};
    if (file_check_writable(luaL_checkstring(L, 1), &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* real_path(path) -> string */
static int real_path(lua_State *L)
{
    err_info e = {0};
    char real[PATH_MAX];
    if (file_real_path(luaL_checkstring(L, 1), real, &e)) return lml_fail(L, &e);
    lua_pushstring(L, real);
    return 1;
}

/* file_target(path) -> string: where a result of that name is written */
static int target(lua_State *L)
{
    err_info e = {0};
    char found[PATH_MAX];
    if (file_target(luaL_checkstring(L, 1), found, &e)) return lml_fail(L, &e);
    lua_pushstring(L, found);
    return 1;
}

/* file_info(path) -> size, time of the last change in nanoseconds since 1970 */
static int info(lua_State *L)
{
    err_info e = {0};
    int64_t n_bytes, changed_ns;
    if (file_info(luaL_checkstring(L, 1), &n_bytes, &changed_ns, &e)) return lml_fail(L, &e);
    lua_pushinteger(L, n_bytes);
    lua_pushinteger(L, changed_ns);
    return 2;
}

/* file_kind(path) -> "file", "directory", "link", "other", or nil when nothing is there */
static int kind(lua_State *L)
{
    static const char *const kinds[] = {NULL, "file", "directory", "link", "other"};
    lua_pushstring(L, kinds[file_what(luaL_checkstring(L, 1))]);
    return 1;
}

/* sha256(bytes) -> 64 hexadecimal digits */
static int sha256(lua_State *L)
{
    size_t n;
    char out[HASH_TEXT];
    const char *bytes = luaL_checklstring(L, 1, &n);
    hash_bytes(bytes, n, out);
    lua_pushstring(L, out);
    return 1;
}

/* sha256_file(path) -> the same of a file's bytes */
static int sha256_file(lua_State *L)
{
    err_info e = {0};
    char out[HASH_TEXT];
    if (hash_file(luaL_checkstring(L, 1), lml_cancel_flag(), out, &e)) return lml_fail(L, &e);
    lua_pushstring(L, out);
    return 1;
}

void lml_open_file(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"file_info", info},
        {"file_kind", kind},
        {"file_target", target},
        {"file_write", write_whole},
        {"check_free", check_free},
        {"free_bytes", free_bytes},
        {"check_writable", check_writable},
        {"list_dir", list_dir},
        {"make_dir", make_dir},
        {"real_path", real_path},
        {"reserve", reserve},
        {"sha256", sha256},
        {"sync_dir", sync_dir},
        {"sha256_file", sha256_file},
        {NULL, NULL},
    };
    luaL_setfuncs(L, functions, 0);
}
