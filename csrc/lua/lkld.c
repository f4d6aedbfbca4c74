/* Predictions compared: model with model, model with a file of reference log-probabilities. */
#include "lua/lmodel.h"

#include <stddef.h>
#include <string.h>

#include "model/kld.h"

#define FILE_CLASS   "moonlet.reference"
#define WRITER_CLASS "moonlet.reference_writer"

/* A tensor [n, hidden] of a model's final rows at `arg`. */
static const float *check_final(lua_State *L, int arg, const model *m, int64_t n)
{
    int64_t rows, cols;
    const float *final = lml_check_rows(L, arg, &rows, &cols);
    luaL_argcheck(L, cols == m->config.hidden_size, arg, "rows of another width than the model's");
    luaL_argcheck(L, rows == n, arg, "one row for each target expected");
    return final;
}

/* ---- files ---------------------------------------------------------------------------------- */

static kld_file *check_file(lua_State *L, int arg)
{
    kld_file *f = luaL_checkudata(L, arg, FILE_CLASS);
    if (!f->set) luaL_error(L, "closed reference");
    return f;
}

static int file_close(lua_State *L)
{
    kld_file_close(luaL_checkudata(L, 1, FILE_CLASS));
    return 0;
}

/* reference_open(path) -> file */
static int file_open(lua_State *L)
{
    err_info e;
    const char *path = luaL_checkstring(L, 1);
    kld_file *f = lua_newuserdatauv(L, sizeof *f, 0);
    *f = (kld_file){0};
    luaL_setmetatable(L, FILE_CLASS);
    return kld_file_open(f, path, &e) ? lml_fail(L, &e) : 1;
}

/* Tensor `which` of the file at argument 1; a finalizer may close that while the table is made. */
static void push_ints(lua_State *L, size_t which)
{
    const st_tensor *t;
    memcpy(&t, (const char *)check_file(L, 1) + which, sizeof t);
    int64_t n = st_elements(t);
    lua_createtable(L, n > INT32_MAX ? INT32_MAX : (int)n, 0);
    check_file(L, 1);
    for (int64_t i = 0; i < n; i++) {
        int32_t v;
        memcpy(&v, t->data + i * (int64_t)sizeof v, sizeof v);
        lua_pushinteger(L, v);
        lua_rawseti(L, -2, i + 1);
    }
}

/* file:info() -> {positions=, vocab=, model=, words=} */
static int file_info(lua_State *L)
{
    lua_createtable(L, 0, 4);
    lua_pushinteger(L, check_file(L, 1)->n);
    lua_setfield(L, -2, "positions");
    lua_pushinteger(L, check_file(L, 1)->vocab);
    lua_setfield(L, -2, "vocab");
    lua_pushstring(L, st_metadata(check_file(L, 1)->set, "model"));
    lua_setfield(L, -2, "model");
    lua_pushstring(L, st_metadata(check_file(L, 1)->set, "words"));
    lua_setfield(L, -2, "words");
    return 1;
}

/* file:texts() -> ids, targets, lengths: sequences one after the other */
static int file_texts(lua_State *L)
{
    push_ints(L, offsetof(kld_file, ids));
    push_ints(L, offsetof(kld_file, targets));
    push_ints(L, offsetof(kld_file, lengths));
    return 3;
}

static kld_writer **check_writer(lua_State *L)
{
    kld_writer **w = luaL_checkudata(L, 1, WRITER_CLASS);
    if (!*w) luaL_error(L, "closed reference");
    return w;
}

/* Also gives up what was not finished. */
static int writer_close(lua_State *L)
{
    kld_writer **w = luaL_checkudata(L, 1, WRITER_CLASS);
    kld_writer_abort(*w);
    *w = NULL;
    return 0;
}

/* reference_create(path, vocab, ids, targets, lengths, model_name, words) -> writer */
static int writer_open(lua_State *L)
{
    err_info e;
    kld_texts texts;
    int64_t n_targets;
    const char *path = luaL_checkstring(L, 1), *name = luaL_checkstring(L, 6);
    const char *words = luaL_checkstring(L, 7);
    lua_Integer vocab = luaL_checkinteger(L, 2);
    luaL_argcheck(L, vocab > 0 && vocab <= INT32_MAX, 2, "out of range");
    texts.ids = lml_check_ids(L, 3, &texts.n_ids);
    texts.targets = lml_check_ids(L, 4, &n_targets);
    texts.lengths = lml_check_ids(L, 5, &texts.n_sequences);
    luaL_argcheck(L, texts.n_ids == n_targets, 4, "one target for each id expected");
    kld_writer **w = lua_newuserdatauv(L, sizeof(kld_writer *), 0);
    *w = NULL;
    luaL_setmetatable(L, WRITER_CLASS);
    *w = kld_writer_open(path, vocab, &texts, name, words, &e);
    return *w ? 1 : lml_fail(L, &e);
}

/* writer:put(model, final, targets) -> true */
static int writer_put(lua_State *L)
{
    int64_t n;
    err_info e;
    const int32_t *targets = lml_check_ids(L, 4, &n);
    model *m = lmodel_check(L, 2)->m;
    const float *final = check_final(L, 3, m, n);
    if (kld_writer_put(*check_writer(L), m, final, targets, n, lml_cancel_flag(), &e))
        return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* writer:finish() -> true; the file is at its path then. */
static int writer_finish(lua_State *L)
{
    err_info e;
    kld_writer **w = check_writer(L), *taken = *w;
    *w = NULL;
    if (kld_writer_finish(taken, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* ---- comparing ------------------------------------------------------------------------------ */

/* kld_compare(model, final, reference, at, targets) -> kl, nll_p, nll_q, top_p, top_q, each [n];
 * reference: a model with its final rows at `at`, or a file with the number of the first position,
 * from 1. */
static int compare(lua_State *L)
{
    int64_t n;
    err_info e;
    lua_settop(L, 5);
    const int32_t *targets = lml_check_ids(L, 5, &n);
    kld_result out = {.kl = lml_push_tensor(L, 'f', 1, &n),
                      .nll_p = lml_push_tensor(L, 'f', 1, &n),
                      .nll_q = lml_push_tensor(L, 'f', 1, &n),
                      .top_p = lml_push_tensor(L, 'i', 1, &n),
                      .top_q = lml_push_tensor(L, 'i', 1, &n)};
    model *m = lmodel_check(L, 1)->m;
    const float *final = check_final(L, 2, m, n);
    kld_reference p = {0};
    if (luaL_testudata(L, 3, FILE_CLASS)) {
        p.file = check_file(L, 3);
        lua_Integer at = luaL_checkinteger(L, 4);
        p.first = at > 0 ? at - 1 : -1;
    } else {
        p.m = lmodel_check(L, 3)->m;
        p.final = check_final(L, 4, p.m, n);
    }
    if (kld_compare(&p, m, final, targets, n, &out, lml_cancel_flag(), &e)) return lml_fail(L, &e);
    return 5;
}

void lml_open_kld(lua_State *L)
{
    static const luaL_Reg file_methods[] = {
        {"close", file_close}, {"info", file_info}, {"texts", file_texts}, {NULL, NULL}};
    static const luaL_Reg writer_methods[] = {
        {"close", writer_close}, {"finish", writer_finish}, {"put", writer_put}, {NULL, NULL}};
    static const luaL_Reg functions[] = {{"kld_compare", compare},
                                         {"reference_create", writer_open},
                                         {"reference_open", file_open},
                                         {NULL, NULL}};
    lml_class(L, FILE_CLASS, file_methods, file_close);
    lml_class(L, WRITER_CLASS, writer_methods, writer_close);
    luaL_setfuncs(L, functions, 0);
}
