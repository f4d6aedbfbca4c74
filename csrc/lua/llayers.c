/* Passes that take all sequences through one layer before the next. */
#include "lua/lmodel.h"

#include <string.h>

#include "model/kld.h"
#include "model/layers.h"

#define CLASS "moonlet.core.layers"

typedef struct layers_box {
    layers *r; /* NULL when closed */
    model_box *owner;
    int64_t *first; /* [n_sequences + 1] in the first user value */
    int64_t n_sequences;
} layers_box;

static layers_box *check_layers_at(lua_State *L, int arg)
{
    layers_box *box = luaL_checkudata(L, arg, CLASS);
    if (!box->r) luaL_error(L, "closed layers");
    lmodel_check_box(L, box->owner);
    return box;
}

static layers_box *check_layers(lua_State *L)
{
    return check_layers_at(L, 1);
}

static int close_layers(lua_State *L)
{
    layers_box *box = luaL_checkudata(L, 1, CLASS);
    if (box->r) {
        ljob_end(box->owner); /* it and this share the cache's pages */
        layers_close(box->r);
        box->r = NULL;
        lmodel_release(box->owner);
    }
    return 0;
}

/* model:layers(sequences [, {kv=, scratch=}]) */
int llayers_new(lua_State *L)
{
    static const char *const keys[] = {"kv", "scratch", NULL};
    lua_settop(L, 3);
    lml_check_keys(L, 3, keys);
    const char *kv = lml_opt_string(L, 3, "kv", "f32");
    int codec = kv_codec_parse(kv);
    layers_options options = {.codec = (kv_codec)codec,
                              .scratch = lml_opt_string(L, 3, "scratch", NULL)};
    err_info e;
    if (codec < 0) {
        err_set(&e, ERR_UNSUPPORTED, "KV codec '%s' is not built; there are f32 and f16", kv);
        return lml_fail(L, &e);
    }
    int64_t *first, n;
    const int32_t *ids = lml_check_sequences(L, 2, &first, &n);

    layers_box *box = lua_newuserdatauv(L, sizeof *box, 2);
    model_box *owner = lmodel_check(L, 1);
    *box = (layers_box){.owner = owner, .first = first, .n_sequences = n};
    luaL_setmetatable(L, CLASS);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    lua_pushvalue(L, 4);
    lua_setiuservalue(L, -2, 2);
    box->r = layers_open(owner->m, ids, first, n, &options, &e);
    if (!box->r) return lml_fail(L, &e);
    owner->n_sessions++;
    return 1;
}

/* layers:step() -> steps done, steps in all; the same numbers when there is nothing left to do */
static int step(lua_State *L)
{
    layers_box *box = check_layers(L);
    err_info e;
    if (layers_step(box->r, lml_cancel_flag(), &e)) return lml_fail(L, &e);
    lua_pushinteger(L, layers_n_done(box->r));
    lua_pushinteger(L, layers_n_steps(box->r));
    return 2;
}

/* layers:rows() -> [n_tokens,H], a copy of the residual stream */
static int rows(lua_State *L)
{
    layers_box *box = check_layers(L);
    int64_t n = box->first[box->n_sequences], H = box->owner->m->config.hidden_size;
    float *out = lml_push_tensor(L, 'f', 2, (int64_t[]){n, H});
    memcpy(out, layers_rows(check_layers(L)->r), (size_t)(n * H) * sizeof *out);
    return 1;
}

/* The targets at argument 3 for all tokens of sequence number argument 2, whose first row is
 * *row; raises unless every step is done. */
static const int32_t *check_targets(lua_State *L, int64_t *row, int64_t *n)
{
    lua_Integer i = luaL_checkinteger(L, 2);
    const int32_t *targets = lml_check_ids(L, 3, n);
    layers_box *box = check_layers(L);
    luaL_argcheck(L, i >= 1 && i <= box->n_sequences, 2, "no such sequence");
    *row = box->first[i - 1];
    luaL_argcheck(L, *n == box->first[i] - *row, 3, "one target for each id expected");
    if (layers_n_done(box->r) != layers_n_steps(box->r)) luaL_error(L, "steps are left to do");
    return targets;
}

/* layers:score(i, targets) -> nll [n] of sequence i, as session:score */
static int score(lua_State *L)
{
    int64_t row, n;
    const int32_t *targets = check_targets(L, &row, &n);
    float *nll = lml_push_tensor(L, 'f', 1, &n);
    err_info e;
    if (layers_score(check_layers(L)->r, row, n, targets, nll, &e)) return lml_fail(L, &e);
    return 1;
}

/* layers:final(i, targets) -> [k,H] of sequence i, as session:final */
static int final(lua_State *L)
{
    int64_t row, n, n_rows = 0;
    const int32_t *targets = check_targets(L, &row, &n);
    int64_t H = check_layers(L)->owner->m->config.hidden_size;
    for (int64_t i = 0; i < n; i++) n_rows += targets[i] >= 0;
    float *out = lml_push_tensor(L, 'f', 2, (int64_t[]){n_rows, H});
    const float *from = layers_rows(check_layers(L)->r) + row * H;
    for (int64_t i = 0; i < n; i++) {
        if (targets[i] < 0) continue;
        memcpy(out, from + i * H, (size_t)H * sizeof *out);
        out += H;
    }
    return 1;
}

/* layers:difference(reference) -> sum of squares of what the residual streams differ by, sum of
 * squares of the reference's */
static int difference(lua_State *L)
{
    layers_box *q = check_layers(L), *p = check_layers_at(L, 2);
    int64_t n = q->first[q->n_sequences], H = q->owner->m->config.hidden_size;
    luaL_argcheck(L, n == p->first[p->n_sequences] && H == p->owner->m->config.hidden_size, 2,
                  "streams of another shape");
    double error = 0, power = 0;
    kld_difference(layers_rows(p->r), layers_rows(q->r), n * H, &error, &power);
    lua_pushnumber(L, error);
    lua_pushnumber(L, power);
    return 2;
}

void llayers_open(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"close", close_layers},
        {"difference", difference},
        {"final", final},
        {"rows", rows},
        {"score", score},
        {"step", step},
        {NULL, NULL},
    };
    lml_class(L, CLASS, methods, close_layers);
}
