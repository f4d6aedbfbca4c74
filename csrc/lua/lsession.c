/* Session and snapshot handles. */
#include "lua/lmodel.h"

#include <string.h>

typedef struct session_box {
    ses *s; /* first: lmodel.c reads it; NULL when closed */
    model_box *owner;
    uint64_t epoch; /* counts changes, so that views of the logits know when they are stale */
} session_box;

typedef struct snap_box {
    ses_snap *snap; /* NULL when closed */
    model_box *owner;
} snap_box;

static session_box *check_session(lua_State *L, int arg)
{
    session_box *box = luaL_checkudata(L, arg, LSESSION_CLASS);
    if (!box->s) luaL_error(L, "closed session");
    lmodel_check_box(L, box->owner);
    return box;
}

static int close_session(lua_State *L)
{
    session_box *box = luaL_checkudata(L, 1, LSESSION_CLASS);
    box->epoch++;
    if (box->s) {
        ljob_end(box->owner);
        ses_close(box->s);
        box->s = NULL;
        lmodel_release(box->owner);
    }
    return 0;
}

int lsession_new(lua_State *L)
{
    static const char *const keys[] = {"ctx", "kv", NULL};
    model_box *owner = lmodel_check(L, 1);
    lml_check_keys(L, 2, keys);
    const char *kv = lml_opt_string(L, 2, "kv", "f16");
    int codec = kv_codec_parse(kv);
    err_info e;
    if (codec < 0) {
        err_set(&e, ERR_UNSUPPORTED, "KV codec '%s' is not built; there are f32 and f16", kv);
        return lml_fail(L, &e);
    }
    ses_options options = {.n_ctx = lml_opt_int(L, 2, "ctx", 0), .codec = (kv_codec)codec};

    session_box *box = lua_newuserdatauv(L, sizeof *box, 1);
    *box = (session_box){.owner = lmodel_check(L, 1)};
    luaL_setmetatable(L, LSESSION_CLASS);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    box->s = ses_open(owner->m, &options, &e);
    if (!box->s) return lml_fail(L, &e);
    owner->n_sessions++;
    return 1;
}

/* Ctrl-C's; or where argument `arg` is n, for specs, `own`, which is raised by the n-th look. */
static const cancel_flag *flag_at(lua_State *L, int arg, cancel_flag *own)
{
    if (lua_isnoneornil(L, arg)) return lml_cancel_flag();
    lua_Integer n = luaL_checkinteger(L, arg);
    luaL_argcheck(L, n >= 1 && n <= INT32_MAX, arg, "out of range");
    atomic_init(own, -(int)n);
    return own;
}

/* session:eval(ids [, look]) -> true; cancelled by the look-th time that it asks, for specs */
static int eval(lua_State *L)
{
    int64_t n;
    cancel_flag own;
    const cancel_flag *cancel = flag_at(L, 3, &own);
    const int32_t *ids = lml_check_ids(L, 2, &n);
    session_box *box = check_session(L, 1);
    err_info e;
    box->epoch++;
    if (ses_eval(box->s, ids, n, NULL, cancel, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

ses_part *lsession_check_parts(lua_State *L, int arg, const model_box *owner, int *n_parts)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    int n = (int)lml_len(L, arg, SES_BATCH);
    lua_createtable(L, 3 * n + 1, 0);
    int kept = lua_gettop(L);
    ses_part *parts = lua_newuserdatauv(L, (size_t)n * sizeof *parts + 1, 0);
    lua_rawseti(L, kept, 3 * n + 1);
    for (int i = 0; i < n; i++) {
        lua_rawgeti(L, arg, i + 1);
        luaL_checktype(L, -1, LUA_TTABLE);
        lml_get(L, kept + 1, "ids");
        parts[i].ids = lml_check_ids(L, kept + 2, &parts[i].n);
        lua_rawseti(L, kept, 3 * i + 1);
        lml_get(L, kept + 1, "session");
        luaL_checkudata(L, -1, LSESSION_CLASS);
        lua_rawseti(L, kept, 3 * i + 2);
        parts[i].score =
            lml_get(L, kept + 1, "score") == LUA_TNIL ? NULL : lscore_check(L, -1, owner);
        lua_rawseti(L, kept, 3 * i + 3);
        lua_settop(L, kept);
    }
    for (int i = 0; i < n; i++) { /* nothing is allocated from here on */
        lua_rawgeti(L, kept, 3 * i + 2);
        session_box *box = check_session(L, kept + 1);
        if (box->owner != owner) luaL_error(L, "part %d is of another model", i);
        box->epoch++;
        parts[i].s = box->s;
        lua_settop(L, kept);
    }
    *n_parts = n;
    return parts;
}

int lsession_eval_parts(lua_State *L)
{
    int n;
    err_info e;
    cancel_flag own;
    const cancel_flag *cancel = flag_at(L, 3, &own);
    const ses_part *parts = lsession_check_parts(L, 2, lmodel_check(L, 1), &n);
    if (ses_eval_parts(parts, n, cancel, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* session:score(ids, targets) -> nll [n]: evaluates ids and scores targets[i], the token that
 * should follow ids[i]; a negative target scores nothing. */
static int score(lua_State *L)
{
    int64_t n, n_targets;
    const int32_t *ids = lml_check_ids(L, 2, &n), *targets = lml_check_ids(L, 3, &n_targets);
    luaL_argcheck(L, n == n_targets, 3, "one target for each id expected");
    ses_want want = {.targets = targets, .nll = lml_push_tensor(L, 'f', 1, &n)};
    session_box *box = check_session(L, 1);
    err_info e;
    box->epoch++;
    if (ses_eval(box->s, ids, n, &want, lml_cancel_flag(), &e)) return lml_fail(L, &e);
    return 1;
}

/* session:final(ids, targets) -> [k,H]: evaluates ids; what the last norm puts out where there is
 * a target, which is what lm_head makes logits of. */
static int final(lua_State *L)
{
    int64_t n, n_targets, n_rows = 0;
    const int32_t *ids = lml_check_ids(L, 2, &n), *targets = lml_check_ids(L, 3, &n_targets);
    luaL_argcheck(L, n == n_targets, 3, "one target for each id expected");
    int64_t H = check_session(L, 1)->owner->m->config.hidden_size;
    for (int64_t i = 0; i < n; i++) n_rows += targets[i] >= 0;
    float *rows = lml_push_tensor(L, 'f', 2, (int64_t[]){n_rows, H});
    float *all = lml_push_tensor(L, 'f', 2, (int64_t[]){n, H});
    lua_toclose(L, -1);
    ses_want want = {.final = all};
    session_box *box = check_session(L, 1);
    err_info e;
    box->epoch++;
    if (ses_eval(box->s, ids, n, &want, lml_cancel_flag(), &e)) return lml_fail(L, &e);
    for (int64_t i = 0, row = 0; i < n; i++)
        if (targets[i] >= 0) memcpy(rows + row++ * H, all + i * H, (size_t)H * sizeof *rows);
    lua_pushvalue(L, -2);
    return 1;
}

/* session:mtp(first, final, next_ids) -> hidden [n,H], logits [n,V]; final: bytes of [n,H] f32.
 * See ses_mtp. */
static int mtp(lua_State *L)
{
    lua_Integer first = luaL_checkinteger(L, 2);
    size_t n_bytes;
    int64_t n;
    const char *final = luaL_checklstring(L, 3, &n_bytes);
    const int32_t *next_ids = lml_check_ids(L, 4, &n);
    const model_config *c = &check_session(L, 1)->owner->m->config;
    int64_t H = c->hidden_size, V = c->vocab_size;
    luaL_argcheck(L, n_bytes == (size_t)n * (size_t)H * sizeof(float), 3,
                  "one row of f32 for each id expected");
    float *rows = lml_push_tensor(L, 'f', 2, (int64_t[]){n, H});
    memcpy(rows, final, n_bytes);
    float *hidden = lml_push_tensor(L, 'f', 2, (int64_t[]){n, H});
    float *out = lml_push_tensor(L, 'f', 2, (int64_t[]){n, V});
    err_info e;
    if (ses_mtp(check_session(L, 1)->s, first, rows, next_ids, n, hidden, out, &e))
        return lml_fail(L, &e);
    return 2;
}

static int logits(lua_State *L)
{
    session_box *box = check_session(L, 1);
    float *row = ses_logits(box->s);
    if (!row) return luaL_error(L, "no logits: nothing has been evaluated, or not to its end");
    lml_push_logits(L, row, box->owner->m->config.vocab_size, &box->epoch, 1);
    return 1;
}

static int n_past(lua_State *L)
{
    lua_pushinteger(L, ses_n_past(check_session(L, 1)->s));
    return 1;
}

static int n_ctx(lua_State *L)
{
    lua_pushinteger(L, ses_n_ctx(check_session(L, 1)->s));
    return 1;
}

static int push_past_ids(lua_State *L)
{
    int64_t n = ses_n_past(check_session(L, 1)->s);
    lua_createtable(L, n < INT32_MAX ? (int)n : 0, 0);
    const ses *s = check_session(L, 1)->s; /* again: a finalizer may have closed or reset it */
    n = ses_n_past(s);
    for (int64_t i = 0; i < n; i++) {
        lua_pushinteger(L, ses_ids(s)[i]);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

/* session:has_logits() -> boolean */
static int has_logits(lua_State *L)
{
    lua_pushboolean(L, ses_logits(check_session(L, 1)->s) != NULL);
    return 1;
}

/* session:reusable(ids) -> how many of the ids need no evaluation: all past tokens when ids begin
 * with them and logits will be there, else none; nil, message, code when ids do not fit. */
static int reusable(lua_State *L)
{
    int64_t n;
    const int32_t *ids = lml_check_ids(L, 2, &n);
    ses *s = check_session(L, 1)->s;
    int64_t past = ses_n_past(s);
    err_info e;
    if (ses_check(s, 0, ids, n, &e)) return lml_fail(L, &e);
    if (past > n || (past == n && !ses_logits(s)) ||
        memcmp(ids, ses_ids(s), (size_t)past * sizeof *ids) != 0)
        past = 0;
    lua_pushinteger(L, past);
    return 1;
}

static int reset(lua_State *L)
{
    session_box *box = check_session(L, 1);
    box->epoch++;
    ses_reset(box->s);
    return 0;
}

static int stats(lua_State *L)
{
    lua_createtable(L, 0, 5);
    const ses *s = check_session(L, 1)->s;
    int64_t sizes[] = {ses_kv_bytes(s), ses_state_bytes(s), ses_n_past(s), ses_n_ctx(s)};
    lua_pushstring(L, kv_codec_name(ses_codec(s)));
    lua_setfield(L, -2, "codec");
    lua_pushinteger(L, sizes[0]);
    lua_setfield(L, -2, "kv_bytes");
    lua_pushinteger(L, sizes[1]);
    lua_setfield(L, -2, "state_bytes");
    lua_pushinteger(L, sizes[2]);
    lua_setfield(L, -2, "n_past");
    lua_pushinteger(L, sizes[3]);
    lua_setfield(L, -2, "n_ctx");
    return 1;
}

/* session:profile(true) counts from zero, profile(false) stops;
 * profile() -> {batches=, tokens=, {op=, calls=, seconds=, bytes=}, ...} */
static int profile_session(lua_State *L)
{
    if (!lua_isnoneornil(L, 2)) {
        luaL_checktype(L, 2, LUA_TBOOLEAN);
        ses_profile(check_session(L, 1)->s, lua_toboolean(L, 2));
        return 0;
    }
    profile f = *ses_profiled(check_session(L, 1)->s);
    lua_createtable(L, PROFILE_N_OPS, 2);
    lua_pushinteger(L, f.n_batches);
    lua_setfield(L, -2, "batches");
    lua_pushinteger(L, f.n_tokens);
    lua_setfield(L, -2, "tokens");
    for (int op = 0, n = 0; op < PROFILE_N_OPS; op++) {
        if (!f.rows[op].calls) continue;
        lua_createtable(L, 0, 4);
        lua_pushstring(L, profile_op_name((profile_op)op));
        lua_setfield(L, -2, "op");
        lua_pushinteger(L, f.rows[op].calls);
        lua_setfield(L, -2, "calls");
        lua_pushnumber(L, f.rows[op].seconds);
        lua_setfield(L, -2, "seconds");
        lua_pushinteger(L, f.rows[op].bytes);
        lua_setfield(L, -2, "bytes");
        lua_rawseti(L, -2, ++n);
    }
    return 1;
}

/* ---- snapshots ------------------------------------------------------------------------------ */

static int close_snap(lua_State *L)
{
    snap_box *box = luaL_checkudata(L, 1, LSNAP_CLASS);
    if (box->snap) {
        ljob_end(box->owner);
        ses_snap_close(box->snap);
        box->snap = NULL;
        lmodel_release(box->owner);
    }
    return 0;
}

static snap_box *check_snap(lua_State *L, int arg)
{
    snap_box *box = luaL_checkudata(L, arg, LSNAP_CLASS);
    if (!box->snap) luaL_error(L, "closed snapshot");
    return box;
}

static int snapshot(lua_State *L)
{
    snap_box *out = lua_newuserdatauv(L, sizeof *out, 1);
    session_box *box = check_session(L, 1);
    *out = (snap_box){.owner = box->owner};
    luaL_setmetatable(L, LSNAP_CLASS);
    lua_getiuservalue(L, 1, 1);
    lua_setiuservalue(L, -2, 1);
    err_info e;
    out->snap = ses_snapshot(box->s, &e);
    if (!out->snap) return lml_fail(L, &e);
    box->owner->n_sessions++;
    return 1;
}

static int restore(lua_State *L)
{
    session_box *box = check_session(L, 1);
    const snap_box *snap = check_snap(L, 2);
    err_info e;
    box->epoch++;
    if (ses_restore(box->s, snap->snap, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

static int snap_n_past(lua_State *L)
{
    lua_pushinteger(L, ses_snap_n_past(check_snap(L, 1)->snap));
    return 1;
}

/* ---- raw state, for specs ------------------------------------------------------------------- */

static int check_layer(lua_State *L, const session_box *box, int full)
{
    const model_config *c = &box->owner->m->config;
    lua_Integer layer = luaL_checkinteger(L, 2);
    luaL_argcheck(L, layer >= 0 && layer < c->n_layers && c->is_full[layer] == full, 2,
                  full ? "not a full-attention layer" : "not a linear layer");
    return (int)layer;
}

/* session:linear_state(layer) -> S [Nv,Dv,Dk], convolution rows [K-1,C] */
static int linear_state(lua_State *L)
{
    session_box *box = check_session(L, 1);
    const model_config *c = &box->owner->m->config;
    int layer = check_layer(L, box, 0);
    int64_t shape[] = {c->lin_v_heads, c->lin_v_dim, c->lin_k_dim};
    int64_t conv_shape[] = {c->conv_kernel - 1, config_conv_width(c)};
    float *S = lml_push_tensor(L, 'f', 3, shape);
    float *conv = lml_push_tensor(L, 'f', 2, conv_shape);
    const float *from = ses_recurrent(check_session(L, 1)->s, layer);
    for (int64_t i = 0; i < shape[0] * shape[1] * shape[2]; i++) S[i] = from[i];
    ses_conv_rows(box->s, layer, conv);
    return 2;
}

/* session:kv_row(layer, position) -> key [Nkv,D], value [Nkv,D] */
static int kv_row(lua_State *L)
{
    session_box *box = check_session(L, 1);
    const model_config *c = &box->owner->m->config;
    int layer = check_layer(L, box, 1);
    lua_Integer pos = luaL_checkinteger(L, 3);
    luaL_argcheck(L, pos >= 0, 3, "position was not evaluated");
    int64_t shape[] = {c->n_kv_heads, c->head_dim};
    float *key = lml_push_tensor(L, 'f', 2, shape), *value = lml_push_tensor(L, 'f', 2, shape);
    const ses *s = check_session(L, 1)->s;
    luaL_argcheck(L, pos < ses_n_past(s), 3, "position was not evaluated");
    ses_kv_row(s, layer, pos, key, value);
    return 2;
}

void lsession_open(lua_State *L)
{
    static const luaL_Reg session_methods[] = {
        {"close", close_session},
        {"eval", eval},
        {"final", final},
        {"has_logits", has_logits},
        {"ids", push_past_ids},
        {"kv_row", kv_row},
        {"linear_state", linear_state},
        {"logits", logits},
        {"mtp", mtp},
        {"n_ctx", n_ctx},
        {"n_past", n_past},
        {"profile", profile_session},
        {"reset", reset},
        {"restore", restore},
        {"reusable", reusable},
        {"score", score},
        {"snapshot", snapshot},
        {"stats", stats},
        {NULL, NULL},
    };
    static const luaL_Reg snap_methods[] = {
        {"close", close_snap}, {"n_past", snap_n_past}, {NULL, NULL}};
    lml_class(L, LSESSION_CLASS, session_methods, close_session);
    lml_class(L, LSNAP_CLASS, snap_methods, close_snap);
}
