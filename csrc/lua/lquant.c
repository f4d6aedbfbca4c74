/* Writing checkpoints one tensor's job at a time. Which tensors, how and where is decided in
 * moonlet.plan and moonlet.quantize. */
#include "lua/lml.h"

#include <string.h>

#include "base/cpu.h"
#include "model/views.h"
#include "quant/quant.h"

#define QUANT "moonlet.quantizer"

typedef struct quantizer {
    const char *path;          /* a Lua string, the user value */
    st_set *source, *hessians; /* the latter NULL unless asked for */
    views *views;              /* NULL unless asked for */
    pool *pool;
    st_writer *writer; /* of the file between create and finish */
    int64_t n_entries;
} quantizer;

static quantizer *check_open(lua_State *L)
{
    quantizer *q = luaL_checkudata(L, 1, QUANT);
    if (!q->source) luaL_error(L, "quantizer is closed");
    return q;
}

static quantizer *check_writing(lua_State *L)
{
    quantizer *q = check_open(L);
    if (!q->writer) luaL_error(L, "no file is being written");
    return q;
}

static int quant_close(lua_State *L)
{
    quantizer *q = luaL_checkudata(L, 1, QUANT);
    st_writer_abort(q->writer);
    pool_close(q->pool);
    views_close(q->views);
    st_close(q->hessians);
    st_close(q->source);
    memset(q, 0, sizeof *q);
    return 0;
}

/* quant_open(path, threads [, with_views]) -> quantizer of the safetensors at path; 0 threads: all
 * processors. with_views: parts may be matrices of the model, stored in whatever format. */
static int quant_open(lua_State *L)
{
    err_info e = {0};
    const char *path = luaL_checkstring(L, 1);
    lua_Integer threads = luaL_checkinteger(L, 2);
    int with_views = lua_toboolean(L, 3);
    luaL_argcheck(L, threads >= 0 && threads <= POOL_MAX_THREADS, 2, "0 to 1024 threads expected");
    quantizer *q = lua_newuserdatauv(L, sizeof *q, 1);
    memset(q, 0, sizeof *q);
    luaL_setmetatable(L, QUANT);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    q->path = path;
    q->source = st_open(path, &e);
    if (q->source && with_views) q->views = views_open(path, q->source, &e);
    if (q->source && (q->views || !with_views))
        q->pool = pool_open(threads ? (int)threads : cpu_count(), &e);
    return q->pool ? 1 : lml_fail(L, &e);
}

/* q:hessians(path) -> true: puts may name Hessians of that file */
static int quant_hessians(lua_State *L)
{
    err_info e = {0};
    const char *path = luaL_checkstring(L, 2);
    quantizer *q = check_open(L);
    if (q->hessians) return luaL_error(L, "a file of Hessians is open already");
    q->hessians = st_open(path, &e);
    if (!q->hessians) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

static lua_Integer get_int(lua_State *L, int table, const char *key)
{
    int ok;
    lml_get(L, table, key);
    lua_Integer n = lua_tointegerx(L, -1, &ok);
    if (!ok) luaL_error(L, "field '%s': integer expected, got %s", key, luaL_typename(L, -1));
    lua_pop(L, 1);
    return n;
}

/* The string stays alive in its table. */
static const char *get_string(lua_State *L, int table, const char *key)
{
    if (lml_get(L, table, key) != LUA_TSTRING)
        luaL_error(L, "field '%s': string expected, got %s", key, luaL_typename(L, -1));
    const char *s = lua_tostring(L, -1);
    lua_pop(L, 1);
    return s;
}

/* q:create(path, {{name=, dtype=, shape=}, ...}, format [, n_done]) -> true
 *
 * Begins a file whose __metadata__ says `format`, or goes on with one whose first n_done entries
 * are complete. A file that is not finished stays as path .. ".partial" when the quantizer is
 * closed. */
static int quant_create(lua_State *L)
{
    err_info e = {0};
    const char *path = luaL_checkstring(L, 2);
    luaL_checktype(L, 3, LUA_TTABLE);
    const char *metadata[] = {"format", luaL_checkstring(L, 4), NULL};
    lua_Integer n_done = luaL_optinteger(L, 5, 0);
    lua_Integer n = lml_len(L, 3, INT32_MAX);
    st_entry *entries = lua_newuserdatauv(L, (size_t)n * sizeof *entries + 1, 0);
    for (lua_Integer i = 0; i < n; i++) {
        lua_rawgeti(L, 3, i + 1);
        lml_check_entry(L, lua_gettop(L), i + 1, &entries[i]);
        lua_pop(L, 1);
    }
    quantizer *q = check_open(L);
    if (q->writer) return luaL_error(L, "a file is being written already");
    q->writer = n_done ? st_writer_resume(path, entries, n, metadata, n_done, &e)
                       : st_writer_open(path, entries, n, metadata, &e);
    if (!q->writer) return lml_fail(L, &e);
    st_writer_keep(q->writer);
    q->n_entries = n;
    lua_pushboolean(L, 1);
    return 1;
}

/* Field `key` of the part on top of the stack: a string of n floats, or nil. A string is aligned
 * for bytes only, so the floats are copied; `keep` is a table that holds the copies. */
static const float *opt_floats(lua_State *L, int keep, const char *key, int64_t n)
{
    size_t bytes;
    int type = lml_get(L, lua_gettop(L), key);
    if (type != LUA_TNIL && type != LUA_TSTRING)
        luaL_error(L, "field '%s': string of floats expected, got %s", key, luaL_typename(L, -1));
    const char *text = lua_tolstring(L, -1, &bytes);
    lua_pop(L, 1);
    if (!text) return NULL;
    if (n < 1 || bytes % sizeof(float) || (size_t)n != bytes / sizeof(float))
        luaL_error(L, "field '%s': %I floats expected, got %I bytes", key, (lua_Integer)n,
                   (lua_Integer)bytes);
    float *copy = lua_newuserdatauv(L, bytes, 0);
    memcpy(copy, text, bytes);
    lua_rawseti(L, keep, (lua_Integer)lua_rawlen(L, keep) + 1);
    return copy;
}

/* A stored tensor as a matrix of `cols` columns. */
static void view_tensor(lua_State *L, const st_tensor *t, int64_t cols, quant_part *part)
{
    num_matrix *m = &part->matrix;
    if (cols < 1 || cols > st_elements(t) || st_elements(t) % cols)
        luaL_error(L, "tensor %s has no rows of %I", t->name, (lua_Integer)cols);
    m->mode = t->dtype == ST_BF16 ? NUM_BF16 : t->dtype == ST_F16 ? NUM_F16 : NUM_F32;
    m->bits = 8 * st_dtype_bytes(t->dtype);
    m->rows = st_elements(t) / cols;
    m->cols = cols;
    m->row_bytes = cols * st_dtype_bytes(t->dtype);
    m->codes = t->data;
    part->opaque = m->mode == NUM_F32 && t->dtype != ST_F32;
    part->name = t->name;
    part->file = t->file;
}

/* {name=} or {view=} of the part on top of the stack. */
static void read_matrix(lua_State *L, int64_t cols, quant_part *part)
{
    int has_view = lml_get(L, lua_gettop(L), "view") != LUA_TNIL;
    lua_pop(L, 1);
    const char *name = get_string(L, lua_gettop(L), has_view ? "view" : "name");
    const quantizer *q = check_open(L);
    const st_tensor *t = has_view ? NULL : st_find(q->source, name);
    const num_matrix *m = has_view && q->views ? views_find(q->views, name, &part->name) : NULL;
    if (!t && !m) luaL_error(L, "no %s %s", has_view ? "matrix" : "tensor", name);
    if (t) {
        view_tensor(L, t, cols, part);
    } else {
        part->matrix = *m;
        part->file = q->path;
    }
}

/* parts[i] = {name= or view=, first_row=, importance=, weights=, col_scale=, row_scale=}; the array
 * and the vectors are left on the stack. A name is that of a stored tensor, a view one of views.h.
 */
static void read_parts(lua_State *L, int job_table, quant_job *job)
{
    static const char *const keys[] = {"name",    "view",      "first_row", "importance",
                                       "weights", "col_scale", "row_scale", NULL};
    lml_get(L, job_table, "parts");
    luaL_checktype(L, -1, LUA_TTABLE);
    int list = lua_gettop(L);
    job->n_parts = lml_len(L, list, INT32_MAX);
    size_t bytes = (size_t)job->n_parts * sizeof(quant_part);
    quant_part *parts = memset(lua_newuserdatauv(L, bytes + 1, 0), 0, bytes);
    lua_newtable(L);
    int keep = lua_gettop(L);
    for (int64_t i = 0; i < job->n_parts; i++) {
        lua_rawgeti(L, list, i + 1);
        luaL_checktype(L, -1, LUA_TTABLE);
        lml_check_keys(L, lua_gettop(L), keys);
        read_matrix(L, job->cols, &parts[i]);
        parts[i].first_row = get_int(L, -1, "first_row");
        parts[i].importance = opt_floats(L, keep, "importance", job->cols);
        if (parts[i].importance) lml_check_importance(L, parts[i].importance, job->cols);
        parts[i].weights = opt_floats(L, keep, "weights", job->cols);
        if (parts[i].weights) lml_check_importance(L, parts[i].weights, job->cols);
        parts[i].col_scale = opt_floats(L, keep, "col_scale", job->cols);
        parts[i].row_scale = opt_floats(L, keep, "row_scale", job->part_rows);
        lua_pop(L, 1);
    }
    job->parts = parts;
}

/* Index of the first of n_arrays entries that take the job's output. */
static int64_t check_entries(lua_State *L, const quantizer *q, lua_Integer entry, int n_arrays)
{
    if (entry < 1 || entry > q->n_entries - n_arrays + 1) luaL_error(L, "no such entry");
    return entry - 1;
}

static num_fit read_fit(lua_State *L, int table, const quant_job *job)
{
    int imatrix;
    num_fit fit = lml_check_fit(L, table, &imatrix);
    for (int64_t i = 0; i < job->n_parts && imatrix; i++)
        if (!job->parts[i].importance)
            luaL_error(L, "%s: fit 'imatrix' without importance", job->parts[i].name);
    return fit;
}

/* Fields hessian and expert into *h; NULL when there are none. */
static const quant_hessian *read_hessian(lua_State *L, int job_table, quant_hessian *h)
{
    int given = lml_get(L, job_table, "hessian") != LUA_TNIL;
    lua_pop(L, 1);
    if (!given) return NULL;
    const char *name = get_string(L, job_table, "hessian");
    const char *counts = lua_pushfstring(L, "%s.counts", name);
    lua_Integer expert = lml_opt_int(L, job_table, "expert", -1);
    if (expert < -1) luaL_error(L, "field 'expert': counted from 0");
    const quantizer *q = check_open(L);
    if (!q->hessians) luaL_error(L, "no file of Hessians is open");
    *h = (quant_hessian){st_find(q->hessians, name), st_find(q->hessians, counts), expert};
    if (!h->sums || !h->counts) luaL_error(L, "no tensors %s and %s", name, counts);
    return h;
}

static quant_op read_op(lua_State *L, int table)
{
    static const char *const ops[] = {"copy", "bf16", "f32", "encode"}; /* as quant_op */
    const char *name = get_string(L, table, "op");
    for (int i = 0; i < (int)(sizeof ops / sizeof *ops); i++)
        if (strcmp(name, ops[i]) == 0) return (quant_op)i;
    luaL_error(L, "field 'op': unknown value '%s'", name);
    return QUANT_COPY;
}

/* Number of arrays that the job's output consists of; 0 and *e if there is no such format. */
static int read_job(lua_State *L, int table, quant_job *job, quant_hessian *h, err_info *e)
{
    static const char *const keys[] = {
        "op",       "parts",   "part_rows", "cols",       "entry",        "mode",        "bits",
        "group",    "flavour", "mx_rule",   "zero_point", "global_scale", "least_scale", "add",
        "subtract", "fit",     "hessian",   "expert",     "exact",        "scale_dtype", NULL};
    int n_arrays = 1;
    luaL_checktype(L, table, LUA_TTABLE);
    lml_check_keys(L, table, keys);
    job->op = read_op(L, table);
    job->part_rows = get_int(L, table, "part_rows");
    job->cols = get_int(L, table, "cols");
    job->add = (float)lml_opt_number(L, table, "add", 0);
    job->subtract = (float)lml_opt_number(L, table, "subtract", 0);
    if (job->op == QUANT_ENCODE) {
        job->format = lml_check_format(L, table);
        job->exact = lml_opt_bool(L, table, "exact", 0);
        if (num_format_check(&job->format, job->cols, e)) return 0;
        n_arrays = job->format.mode == NUM_AFFINE ? 3 : 2;
    }
    read_parts(L, table, job);
    job->fit = read_fit(L, table, job);
    if (job->op == QUANT_ENCODE && num_fit_check(&job->format, job->fit, e)) return 0;
    job->hessian = read_hessian(L, table, h);
    job->ops = kern_select(lml_cpu_level(L));
    return n_arrays;
}

/* q:put{op=, parts=, part_rows=, cols=, entry=, add=, subtract=, mode=, bits=, group=, flavour=,
 *       mx_rule=, zero_point=, global_scale=, least_scale=, scale_dtype=, fit=, exact=, hessian=,
 *       expert=} -> true, matrices of the Hessian that were of no use
 *
 * op: copy, bf16, f32 or encode (which needs mode, bits and group). entry: the 1-based entry of
 * the weight; scales and biases (or packed zero points) are the entries behind it. add, subtract:
 * numbers, as in quant.h. hessian: of which tensor of the open file, for encoding with error
 * feedback; expert: which matrix of it, from 0, if all rows are that expert's. */
static int quant_put(lua_State *L)
{
    err_info e = {0};
    int64_t n_lost = 0;
    quant_job job = {.scales = -1, .biases = -1, .n_lost = &n_lost};
    quant_hessian hessian;
    int n_arrays = read_job(L, 2, &job, &hessian, &e);
    if (!n_arrays) return lml_fail(L, &e);
    lua_Integer entry = get_int(L, 2, "entry");
    const quantizer *q = check_writing(L);
    job.weight = check_entries(L, q, entry, n_arrays);
    if (n_arrays > 1) job.scales = job.weight + 1;
    if (n_arrays > 2) job.biases = job.weight + 2;
    if (quant_run(&job, q->writer, q->pool, lml_cancel_flag(), &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    lua_pushinteger(L, n_lost);
    return 2;
}

/* q:sync() -> true: what was put survives a power cut */
static int quant_sync(lua_State *L)
{
    err_info e = {0};
    if (st_writer_sync(check_writing(L)->writer, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* q:put_data(entry, bytes) -> true: all bytes of an entry */
static int quant_put_data(lua_State *L)
{
    err_info e = {0};
    size_t n;
    lua_Integer entry = luaL_checkinteger(L, 2);
    const char *bytes = luaL_checklstring(L, 3, &n);
    const quantizer *q = check_writing(L);
    int64_t i = check_entries(L, q, entry, 1);
    if (st_writer_put(q->writer, i, 0, bytes, (int64_t)n, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* q:try(put, rows) -> true: the work of q:put on some of its rows, writing nothing */
static int quant_try_put(lua_State *L)
{
    err_info e = {0};
    quant_job job = {.scales = -1, .biases = -1};
    quant_hessian hessian;
    lua_Integer rows = luaL_checkinteger(L, 3);
    luaL_argcheck(L, rows > 0, 3, "out of range");
    if (!read_job(L, 2, &job, &hessian, &e)) return lml_fail(L, &e);
    const quantizer *q = check_open(L);
    if (quant_try(&job, rows, q->pool, lml_cancel_flag(), &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* q:largest(put) -> the largest magnitude of what q:put(put) would encode */
static int quant_largest_of(lua_State *L)
{
    err_info e = {0};
    quant_job job = {0};
    quant_hessian hessian;
    float largest;
    if (!read_job(L, 2, &job, &hessian, &e)) return lml_fail(L, &e);
    const quantizer *q = check_open(L);
    if (quant_largest(&job, q->pool, lml_cancel_flag(), &largest, &e)) return lml_fail(L, &e);
    lua_pushnumber(L, (lua_Number)largest);
    return 1;
}

/* q:damage(put, rows) -> {error, ...}, {size, ...}: quant_damage of each part */
static int quant_damage_of(lua_State *L)
{
    err_info e = {0};
    quant_job job = {0};
    quant_hessian hessian;
    lua_Integer rows = luaL_checkinteger(L, 3);
    luaL_argcheck(L, rows > 0, 3, "out of range");
    if (!read_job(L, 2, &job, &hessian, &e)) return lml_fail(L, &e);
    quant_loss *losses = lua_newuserdatauv(L, (size_t)job.n_parts * sizeof *losses + 1, 0);
    const quantizer *q = check_open(L);
    if (quant_damage(&job, rows, q->pool, lml_cancel_flag(), losses, &e)) return lml_fail(L, &e);
    lua_createtable(L, (int)job.n_parts, 0);
    lua_createtable(L, (int)job.n_parts, 0);
    for (int64_t i = 0; i < job.n_parts; i++) {
        lua_pushnumber(L, losses[i].error);
        lua_rawseti(L, -3, i + 1);
        lua_pushnumber(L, losses[i].size);
        lua_rawseti(L, -2, i + 1);
    }
    return 2;
}

/* q:values(put) -> f32 bytes of what q:put(put) would round */
static int quant_values_of(lua_State *L)
{
    err_info e = {0};
    quant_job job = {0};
    quant_hessian hessian;
    if (!read_job(L, 2, &job, &hessian, &e)) return lml_fail(L, &e);
    int64_t n;
    if (__builtin_mul_overflow(job.n_parts, job.part_rows, &n) ||
        __builtin_mul_overflow(n, job.cols, &n) || n < 0 || n > INT32_MAX)
        return luaL_error(L, "too many values");
    luaL_Buffer b;
    float *out = (float *)(void *)luaL_buffinitsize(L, &b, (size_t)n * sizeof *out);
    check_open(L);
    if (quant_values(&job, out, &e)) return lml_fail(L, &e);
    luaL_pushresultsize(&b, (size_t)n * sizeof *out);
    return 1;
}

/* q:finish() -> true: the file is complete, synced and has its name */
static int quant_finish(lua_State *L)
{
    err_info e = {0};
    quantizer *q = check_writing(L);
    st_writer *w = q->writer;
    q->writer = NULL;
    if (st_writer_finish(w, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

void lml_open_quant(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"create", quant_create},      {"put", quant_put},
        {"put_data", quant_put_data},  {"try", quant_try_put},
        {"largest", quant_largest_of}, {"hessians", quant_hessians},
        {"values", quant_values_of},   {"damage", quant_damage_of},
        {"sync", quant_sync},          {"finish", quant_finish},
        {"close", quant_close},        {NULL, NULL},
    };
    static const luaL_Reg functions[] = {{"quant_open", quant_open}, {NULL, NULL}};
    lml_class(L, QUANT, methods, quant_close);
    luaL_setfuncs(L, functions, 0);
}
