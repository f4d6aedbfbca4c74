/* Model handles: opening, configuration, and the forward pass of a fresh sequence. */
#include "lua/lmodel.h"

#include <string.h>

#include "base/worker.h"
#include "lua/llayout.h"
#include "model/replace.h"

static model_box *to_box(lua_State *L, int arg)
{
    return luaL_checkudata(L, arg, LMODEL_CLASS);
}

void lmodel_check_box(lua_State *L, const model_box *box)
{
    if (box->closed) luaL_error(L, "closed model");
    if (box->job) luaL_error(L, "the model is computing");
}

model_box *lmodel_check(lua_State *L, int arg)
{
    model_box *box = to_box(L, arg);
    lmodel_check_box(L, box);
    return box;
}

void lmodel_release(model_box *box)
{
    box->n_sessions--;
    if (box->closed && box->n_sessions == 0) {
        worker_close(box->worker);
        box->worker = NULL;
        model_close(box->m);
        box->m = NULL;
    }
}

static int close_model(lua_State *L)
{
    model_box *box = to_box(L, 1);
    if (!box->closed) {
        ljob_end(box);
        box->closed = 1;
        box->n_sessions++;
        lmodel_release(box);
    }
    return 0;
}

/* core.model_open(dir [, {threads=, int8=, kernels=}]): int8 rounds what quantized matrices read to
 * 8 bits; kernels is a name of core.kernels() */
static int open_model(lua_State *L)
{
    static const char *const keys[] = {"threads", "int8", "kernels", NULL};
    const char *dir = luaL_checkstring(L, 1);
    lml_check_keys(L, 2, keys);
    lua_Integer n_threads = lml_opt_int(L, 2, "threads", 0);
    luaL_argcheck(L, n_threads >= 0 && n_threads <= POOL_MAX_THREADS, 2,
                  "threads: 0 to 1024 expected");
    model_options options = {.n_threads = (int)n_threads};
    const char *kernels = lml_opt_string(L, 2, "kernels", NULL);
    options.level = kernels ? lml_kernels_level(L, kernels) : lml_cpu_level(L);
    options.int8 = lml_opt_bool(L, 2, "int8", 0);

    model_box *box = lua_newuserdatauv(L, sizeof *box, 0);
    *box = (model_box){.closed = 1};
    luaL_setmetatable(L, LMODEL_CLASS);
    err_info e;
    box->m = model_open(dir, &options, &e);
    if (!box->m) return lml_fail(L, &e);
    box->closed = 0;
    return 1;
}

static int push_info(lua_State *L)
{
    const model *m = lua_touserdata(L, 1);
    llayout_push(L, &m->config, &m->weights, m->files);
    lua_pushinteger(L, pool_n_threads(m->pool));
    lua_setfield(L, -2, "threads");
    lua_pushstring(L, m->ops->name);
    lua_setfield(L, -2, "kernels");
    return 1;
}

/* model:info() -> what it holds, and threads and kernels that run it. A finalizer may close the
 * model meanwhile: its memory is held as by a session. */
static int info(lua_State *L)
{
    model_box *box = lmodel_check(L, 1);
    lua_pushcfunction(L, push_info);
    lua_pushlightuserdata(L, box->m);
    box->n_sessions++;
    int status = lua_pcall(L, 1, 1, 0);
    lmodel_release(box);
    return status ? lua_error(L) : 1;
}

/* model:kv_bytes() -> bytes of key and value pages that sessions and snapshots hold, shared ones
 * counted once, and of those that only snapshots hold */
static int kv_bytes(lua_State *L)
{
    const model *m = lmodel_check(L, 1)->m;
    int64_t bytes = 0, kept_bytes = 0, n_kept, page;
    for (int codec = 0; codec < KV_N_CODECS; codec++) {
        int64_t n = model_kv_pages(m, (kv_codec)codec, &n_kept, &page);
        bytes += n * page;
        kept_bytes += n_kept * page;
    }
    lua_pushinteger(L, bytes);
    lua_pushinteger(L, kept_bytes);
    return 2;
}

/* model:check_finite() -> true, or nil and where the first NaN or infinite weight lies. */
static int check_finite(lua_State *L)
{
    err_info e;
    if (model_check_finite(lmodel_check(L, 1)->m, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* ---- replaced matrices ---------------------------------------------------------------------- */

/* model:replace(name, matrix) -> true; matrix as lml_check_matrix takes it. */
static int replace(lua_State *L)
{
    err_info e;
    num_matrix w;
    const char *name = luaL_checkstring(L, 2);
    lml_check_matrix(L, 3, &w);
    if (model_replace(lmodel_check(L, 1)->m, name, &w, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* Field importance of the table at 3, a copy left on the stack; NULL when there is none. */
static const float *opt_importance(lua_State *L, int64_t *n)
{
    size_t bytes;
    *n = 0;
    if (lml_get(L, 3, "importance") == LUA_TNIL) return NULL;
    if (lua_type(L, -1) != LUA_TSTRING) luaL_error(L, "option 'importance': string expected");
    const char *text = lua_tolstring(L, -1, &bytes);
    if (bytes % sizeof(float)) luaL_error(L, "option 'importance': f32 expected");
    float *copy = lua_newuserdatauv(L, bytes + 1, 0); /* strings are aligned for bytes only */
    memcpy(copy, text, bytes);
    *n = (int64_t)(bytes / sizeof *copy);
    lml_check_importance(L, copy, *n);
    return copy;
}

/* model:encode(name, {mode=, bits=, group=, flavour=, mx_rule=, global_scale=, fit=, importance=})
 * -> bytes of the copy that runs now */
static int encode(lua_State *L)
{
    static const char *const keys[] = {"mode",         "bits", "group",      "flavour", "mx_rule",
                                       "global_scale", "fit",  "importance", NULL};
    err_info e;
    int imatrix;
    int64_t n_bytes;
    const char *name = luaL_checkstring(L, 2);
    luaL_checktype(L, 3, LUA_TTABLE);
    lml_check_keys(L, 3, keys);
    model_encoding how = {.format = lml_check_format(L, 3), .fit = lml_check_fit(L, 3, &imatrix)};
    how.importance = opt_importance(L, &how.n_importance);
    if (imatrix && !how.importance) luaL_error(L, "fit 'imatrix' needs 'importance'");
    if (!imatrix && how.fit == NUM_FIT_MSE) how.importance = NULL;
    model *m = lmodel_check(L, 1)->m;
    if (model_encode(m, name, &how, lml_cancel_flag(), &n_bytes, &e)) return lml_fail(L, &e);
    lua_pushinteger(L, n_bytes);
    return 1;
}

/* model:restore([name]) -> true */
static int restore(lua_State *L)
{
    err_info e;
    const char *name = luaL_optstring(L, 2, NULL);
    if (model_restore(lmodel_check(L, 1)->m, name, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* ---- forward -------------------------------------------------------------------------------- */

enum { WANT_LOGITS = 1, WANT_HIDDEN = 2, WANT_ROUTER = 4, WANT_MTP = 8 };

static int read_want(lua_State *L, int arg)
{
    static const char *const names[] = {"logits", "hidden", "router", "mtp", NULL};
    luaL_checktype(L, arg, LUA_TTABLE);
    int want = 0;
    for (lua_Integer i = 1, n = lml_len(L, arg, INT32_MAX); i <= n; i++) {
        lua_rawgeti(L, arg, i);
        const char *name = lua_tostring(L, -1);
        int k = 0;
        while (names[k] && (!name || strcmp(name, names[k]) != 0)) k++;
        if (!names[k])
            luaL_error(L, "want: '%s' is none of logits, hidden, router, mtp",
                       luaL_tolstring(L, -1, NULL));
        want |= 1 << k;
        lua_pop(L, 1);
    }
    return want;
}

/* Pushes router = { {ids=[n,k], weights=[n,k]}, ... } from arrays over all layers. */
static void push_router(lua_State *L, const model_config *c, int64_t n, const int32_t *ids,
                        const float *weights_of)
{
    int64_t k = c->n_experts_used, shape[] = {n, k}, size = n * k;
    lua_createtable(L, c->n_layers, 0);
    for (int layer = 0; layer < c->n_layers; layer++) {
        lua_createtable(L, 0, 2);
        memcpy(lml_push_tensor(L, 'i', 2, shape), ids + layer * size, (size_t)size * sizeof *ids);
        lua_setfield(L, -2, "ids");
        memcpy(lml_push_tensor(L, 'f', 2, shape), weights_of + layer * size,
               (size_t)size * sizeof *weights_of);
        lua_setfield(L, -2, "weights");
        lua_rawseti(L, -2, layer + 1);
    }
}

/* mtp = {next_ids=[n], hidden=[n,H], logits=[n,V]}: row p sees token p+1; the last row sees the
 * trunk's best guess. The session is the userdata on top of the stack. */
static err_code push_mtp(lua_State *L, ses *s, const model *m, const int32_t *ids, int64_t n,
                         const float *final, err_info *e)
{
    int64_t V = m->config.vocab_size, H = m->config.hidden_size, shape[] = {n, H};
    lua_createtable(L, 0, 3);
    int32_t *next = lml_push_tensor(L, 'i', 1, shape);
    memcpy(next, ids + 1, (size_t)(n - 1) * sizeof *next);
    const float *logits = ses_logits(s);
    for (int64_t i = 1; i < V; i++)
        if (logits[i] > logits[next[n - 1]]) next[n - 1] = (int32_t)i;
    lua_setfield(L, -2, "next_ids");
    float *hidden = lml_push_tensor(L, 'f', 2, shape);
    lua_setfield(L, -2, "hidden");
    shape[1] = V;
    float *out = lml_push_tensor(L, 'f', 2, shape);
    lua_setfield(L, -2, "logits");
    return ses_mtp(s, 0, final, next, n, hidden, out, e);
}

/* model:forward(ids, want) -> {logits=[n,V], hidden=[L+1,n,H], final=[n,H], router=, mtp=} */
static int forward(lua_State *L)
{
    lua_settop(L, 3);
    int64_t n;
    const int32_t *ids = lml_check_ids(L, 2, &n);
    int want = read_want(L, 3);
    const model *m = lmodel_check(L, 1)->m;
    const model_config *c = &m->config;
    int64_t L1 = c->n_layers + 1, H = c->hidden_size, k = c->n_experts_used;
    err_info e;
    if (n == 0) {
        err_set(&e, ERR_RANGE, "no tokens to evaluate");
        return lml_fail(L, &e);
    }
    if ((want & WANT_ROUTER) && !c->is_moe) {
        err_set(&e, ERR_UNSUPPORTED, "this model is dense: it has no router");
        return lml_fail(L, &e);
    }
    lua_pushcfunction(L, lsession_new);
    lua_pushvalue(L, 1);
    lua_createtable(L, 0, 2);
    lua_pushinteger(L, n);
    lua_setfield(L, -2, "ctx");
    lua_pushliteral(L, "f32");
    lua_setfield(L, -2, "kv");
    lua_call(L, 2, 3);
    if (lua_isnil(L, 5)) return 3;
    lua_settop(L, 5);
    lua_toclose(L, 5);
    ses *s = *(ses **)lua_touserdata(L, 5);

    lua_createtable(L, 0, 4);
    ses_want out = {0};
    if (want & WANT_LOGITS) {
        out.logits = lml_push_tensor(L, 'f', 2, (int64_t[]){n, c->vocab_size});
        lua_setfield(L, 6, "logits");
    }
    if (want & (WANT_HIDDEN | WANT_MTP)) {
        out.final = lml_push_tensor(L, 'f', 2, (int64_t[]){n, H});
        lua_setfield(L, 6, "final");
    }
    if (want & WANT_HIDDEN) {
        out.hidden = lml_push_tensor(L, 'f', 3, (int64_t[]){L1, n, H});
        lua_setfield(L, 6, "hidden");
    }
    if (want & WANT_ROUTER) {
        out.router_ids = lml_push_tensor(L, 'i', 3, (int64_t[]){c->n_layers, n, k});
        out.router_weights = lml_push_tensor(L, 'f', 3, (int64_t[]){c->n_layers, n, k});
    }
    if (ses_eval(s, ids, n, &out, lml_cancel_flag(), &e)) return lml_fail(L, &e);
    if (want & WANT_ROUTER) {
        push_router(L, c, n, out.router_ids, out.router_weights);
        lua_setfield(L, 6, "router");
    }
    if (want & WANT_MTP) {
        if (push_mtp(L, s, m, ids, n, out.final, &e)) return lml_fail(L, &e);
        lua_setfield(L, 6, "mtp");
    }
    lua_settop(L, 6);
    return 1;
}

void lml_open_model(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"calibrate", lcalib_new},
        {"check_finite", check_finite},
        {"close", close_model},
        {"encode", encode},
        {"eval_parts", lsession_eval_parts},
        {"forward", forward},
        {"info", info},
        {"kv_bytes", kv_bytes},
        {"layers", llayers_new},
        {"replace", replace},
        {"restore", restore},
        {"scoring", lscore_new},
        {"session", lsession_new},
        {"start_parts", ljob_start},
        {NULL, NULL},
    };
    lml_class(L, LMODEL_CLASS, methods, close_model);
    lua_pushcfunction(L, open_model);
    lua_setfield(L, -2, "model_open");
    lcalib_open(L);
    llayers_open(L);
    lscore_open(L);
    lsession_open(L);
    ljob_open(L);
}
