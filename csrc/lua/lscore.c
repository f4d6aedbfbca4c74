/* Scores: what a model makes of a text, filled in while a session takes it in. */
#include "lua/lmodel.h"

#include <string.h>

#define LSCORE_CLASS "moonlet.core.score"

typedef struct score_box {
    ses_score score; /* its arrays follow it in the userdata, which a batch keeps alive */
    int64_t n_hidden;
} score_box;

static const score_box *check_score(lua_State *L)
{
    return luaL_checkudata(L, 1, LSCORE_CLASS);
}

const ses_score *lscore_check(lua_State *L, int arg, const model_box *owner)
{
    const score_box *box = luaL_checkudata(L, arg, LSCORE_CLASS);
    lmodel_check_box(L, owner);
    luaL_argcheck(L, !box->score.sums || box->n_hidden == owner->m->config.hidden_size, arg,
                  "the score of another model");
    return &box->score;
}

/* Sizes are of arrays that Lua has held as tables of larger elements, times at most LSCORE_TOP. */
enum { LSCORE_TOP = 64 };

/* Also while the model computes: what its size is does not change. */
static int64_t hidden_size(lua_State *L)
{
    const model_box *box = luaL_checkudata(L, 1, LMODEL_CLASS);
    if (box->closed) luaL_error(L, "closed model");
    return box->m->config.hidden_size;
}

/* model:scoring(ids, {top=, mean=}) -> score: of the log-probabilities, or the mean */
int lscore_new(lua_State *L)
{
    static const char *const keys[] = {"top", "mean", NULL};
    int64_t n;
    const int32_t *ids = lml_check_ids(L, 2, &n);
    lml_check_keys(L, 3, keys);
    lua_Integer n_top = lml_opt_int(L, 3, "top", 0);
    luaL_argcheck(L, n_top >= 0 && n_top <= LSCORE_TOP, 3, "top: 0 to 64 expected");
    int mean = lml_opt_bool(L, 3, "mean", 0);
    int64_t H = mean ? hidden_size(L) : 0;
    size_t rows = mean ? 0 : (size_t)n, tops = rows * (size_t)n_top;

    size_t sums_at = (sizeof(score_box) + 15) / 16 * 16;
    size_t floats_at = sums_at + (size_t)H * sizeof(double);
    size_t ids_at = floats_at + (rows + tops) * sizeof(float);
    size_t size = ids_at + (tops + rows + (size_t)n) * sizeof(int32_t);
    char *memory = lua_newuserdatauv(L, size, 0);
    memset(memory, 0, size);
    float *floats = (float *)(void *)(memory + floats_at);
    int32_t *numbers = (int32_t *)(void *)(memory + ids_at);
    memcpy(numbers, ids, (size_t)n * sizeof *ids);
    score_box *box = (score_box *)(void *)memory;
    box->n_hidden = H;
    box->score = (ses_score){.ids = numbers,
                             .n = n,
                             .n_top = (int)n_top,
                             .logprobs = mean ? NULL : floats,
                             .ranks = mean ? NULL : numbers + n,
                             .top_ids = numbers + n + rows,
                             .top_logprobs = floats + rows,
                             .sums = mean ? (double *)(void *)(memory + sums_at) : NULL};
    luaL_setmetatable(L, LSCORE_CLASS);
    return 1;
}

/* score:at(i) -> log-probability of token i >= 2 by those before it, {id, ...}, {logprob, ...} of
 * the likeliest in its place, best first, and its rank among all there, from 1 */
static int at(lua_State *L)
{
    const ses_score *s = &check_score(L)->score;
    lua_Integer i = luaL_checkinteger(L, 2);
    luaL_argcheck(L, s->logprobs && i >= 2 && i <= s->n, 2, "no such token is scored");
    lua_pushnumber(L, (lua_Number)s->logprobs[i - 1]);
    lua_createtable(L, s->n_top, 0);
    lua_createtable(L, s->n_top, 0);
    for (int k = 0; k < s->n_top; k++) {
        int64_t from = (i - 1) * s->n_top + k;
        if (s->top_ids[from] < 0) break;
        lua_pushinteger(L, s->top_ids[from]);
        lua_rawseti(L, -3, k + 1);
        lua_pushnumber(L, (lua_Number)s->top_logprobs[from]);
        lua_rawseti(L, -2, k + 1);
    }
    lua_pushinteger(L, s->ranks[i - 1]);
    return 4;
}

/* score:mean() -> list of what the last norm puts out, averaged over the text */
static int mean(lua_State *L)
{
    const score_box *box = check_score(L);
    luaL_argcheck(L, box->score.sums, 1, "a score of the mean expected");
    lua_createtable(L, (int)box->n_hidden, 0);
    for (int64_t i = 0; i < box->n_hidden; i++) {
        lua_pushnumber(L, box->score.sums[i] / (double)box->score.n);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

static int nothing_to_free(lua_State *L)
{
    (void)L;
    return 0;
}

void lscore_open(lua_State *L)
{
    static const luaL_Reg methods[] = {{"at", at}, {"mean", mean}, {NULL, NULL}};
    lml_class(L, LSCORE_CLASS, methods, nothing_to_free);
}
