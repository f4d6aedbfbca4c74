/* moonlet.core: which kernels there are, and for specs a way to run any of them on byte strings. */
#include "lua/lguard.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/pool.h"
#include "kern/kern.h"

static float arg_number(lua_State *L, const char *key)
{
    lua_getfield(L, 3, key);
    float f = (float)luaL_checknumber(L, -1);
    lua_pop(L, 1);
    return f;
}

static int64_t arg_count(lua_State *L, const char *key, int64_t fallback)
{
    lua_Integer n = lml_opt_int(L, 3, key, fallback);
    if (n < 1 || n > 1 << 24) luaL_error(L, "'%s': out of range", key);
    return n;
}

static int push_floats(lua_State *L, const float *p, int64_t n)
{
    lua_pushlstring(L, (const char *)p, (size_t)n * sizeof *p);
    return 1;
}

/* ---- ops: each takes its arguments from the table at 3 -------------------------------------- */

/* args.matrix with its arrays guarded */
static void arg_matrix(lua_State *L, num_matrix *m)
{
    lua_getfield(L, 3, "matrix");
    lml_check_matrix(L, lua_gettop(L), m);
    static const char *const keys[] = {"codes", "scales", "biases"};
    const uint8_t **parts[] = {&m->codes, &m->scales, &m->biases};
    int table = lua_gettop(L);
    for (int i = 0; i < 3; i++) {
        size_t n;
        if (!*parts[i]) continue;
        lua_getfield(L, table, keys[i]);
        const char *bytes = lua_tolstring(L, -1, &n);
        *parts[i] = lguard_copy(L, bytes, n);
    }
}

static int run_decode(lua_State *L, const kern_ops *ops)
{
    num_matrix m;
    luaL_Buffer b;
    arg_matrix(L, &m);
    size_t row_bytes = (size_t)m.cols * sizeof(float);
    float *row = lguard_new(L, row_bytes);
    luaL_buffinit(L, &b);
    for (int64_t r = 0; r < m.rows; r++) {
        ops->decode[m.mode](&m, r, row);
        luaL_addlstring(&b, (const char *)row, row_bytes);
    }
    luaL_pushresult(&b);
    return 1;
}

/* The pool of `threads` must be closed by the caller. */
static pool *open_pool(lua_State *L)
{
    err_info e;
    pool *p = pool_open((int)arg_count(L, "threads", 1), &e);
    if (!p) luaL_error(L, "%s", e.text);
    return p;
}

/* Workspace for n rows of x in 8 bits and in bf16 when args.fast is set, else NULL. */
static void *arg_rows(lua_State *L, const kern_ops *ops, int64_t n, int64_t cols)
{
    if (!lml_opt_bool(L, 3, "fast", 0)) return NULL;
    return lguard_new(L, (size_t)(n * (kern_int8_bytes(cols) + kern_bf16_bytes(ops, cols))));
}

/* {matrix, x [n_x][cols], n_x, threads, repeats, fast} -> y [n_x][rows], seconds of the fastest
 * run */
static int run_linear(lua_State *L, const kern_ops *ops)
{
    num_matrix m;
    arg_matrix(L, &m);
    int64_t n_x = arg_count(L, "n_x", 1), repeats = arg_count(L, "repeats", 1);
    int64_t threads = arg_count(L, "threads", 1);
    const float *x = lguard_floats(L, "x", n_x * m.cols);
    float *y = lguard_new(L, (size_t)(n_x * m.rows) * sizeof *y);
    char *scratch = lguard_new(L, (size_t)(threads * kern_scratch_bytes(m.cols)));
    void *rows = arg_rows(L, ops, n_x, m.cols);
    kern_job job = {.w = &m, .x = x, .y = y, .ldx = m.cols, .n_x = n_x, .ldy = m.rows};
    pool *p = open_pool(L);
    double best = 0;
    for (int64_t i = 0; i < repeats; i++) {
        double start = clock_seconds();
        if (rows)
            kern_linear_jobs_fast(p, ops, &job, 1, m.cols, scratch, rows);
        else
            kern_linear(p, ops, &m, x, m.cols, n_x, y, m.rows, scratch);
        double seconds = clock_seconds() - start;
        if (i == 0 || seconds < best) best = seconds;
    }
    pool_close(p);
    push_floats(L, y, n_x * m.rows);
    lua_pushnumber(L, best);
    return 2;
}

/* Element j of the table args[key], a string or, when that is allowed, absent: NULL. */
static const char *list_string(lua_State *L, const char *key, int64_t j, int optional, size_t *n)
{
    *n = 0;
    if (lml_get(L, 3, key) == LUA_TNIL && optional) return NULL;
    if (lua_geti(L, -1, j + 1) != LUA_TSTRING && !optional)
        luaL_error(L, "'%s': strings expected", key);
    return lua_tolstring(L, -1, n);
}

/* The x of job j and what it picks of it; one string that jobs share is one x. */
static void job_rows(lua_State *L, kern_job *jobs, int64_t j, const char **seen)
{
    size_t x_bytes, n_picked;
    const char *x = list_string(L, "xs", j, 0, &x_bytes);
    const char *pick = list_string(L, "picks", j, 1, &n_picked);
    kern_job *job = &jobs[j];
    size_t row = (size_t)job->ldx * sizeof(float);
    luaL_argcheck(L, x_bytes % row == 0, 3, "xs: not whole rows");
    job->x = x == *seen ? jobs[j - 1].x : lguard_copy(L, x, x_bytes);
    job->n_x = job->n_from = (int64_t)(x_bytes / row);
    *seen = x;
    if (!pick) return;
    job->pick = lguard_copy(L, pick, n_picked);
    job->n_x = (int64_t)(n_picked / sizeof *job->pick);
    for (int64_t i = 0; i < job->n_x; i++)
        luaL_argcheck(L, job->pick[i] >= 0 && job->pick[i] < job->n_from, 3, "picks: no such row");
}

/* {matrices = {matrix, ...}, xs = {x, ...}, picks = {i32 rows of x or nothing, ...}, threads, fast}
 * -> y of each job, all in one region */
static int run_jobs(lua_State *L, const kern_ops *ops)
{
    lua_getfield(L, 3, "matrices");
    int matrices = lua_gettop(L);
    luaL_checktype(L, matrices, LUA_TTABLE);
    int64_t n = lml_len(L, matrices, 1024), max_cols = 1, n_rows = 0;
    int64_t threads = arg_count(L, "threads", 1);
    num_matrix *m = lguard_new(L, (size_t)n * sizeof *m);
    kern_job *jobs = lguard_new(L, (size_t)n * sizeof *jobs);
    const char *seen = NULL;
    luaL_checkstack(L, (int)(8 * n) + 8, NULL);
    for (int64_t j = 0; j < n; j++) {
        lua_geti(L, matrices, j + 1);
        lml_check_matrix(L, lua_gettop(L), &m[j]);
        jobs[j] = (kern_job){.w = &m[j], .ldx = m[j].cols, .ldy = m[j].rows};
        job_rows(L, jobs, j, &seen);
        jobs[j].y = lguard_new(L, (size_t)(jobs[j].n_x * m[j].rows) * sizeof(float));
        if (m[j].cols > max_cols) max_cols = m[j].cols;
        n_rows += jobs[j].n_x + jobs[j].n_from;
    }
    char *scratch = lguard_new(L, (size_t)(threads * kern_scratch_bytes(max_cols)));
    void *rows = arg_rows(L, ops, n_rows, max_cols);
    pool *p = open_pool(L);
    if (rows)
        kern_linear_jobs_fast(p, ops, jobs, n, max_cols, scratch, rows);
    else
        kern_linear_jobs(p, ops, jobs, n, max_cols, scratch);
    pool_close(p);
    lua_createtable(L, (int)n, 0);
    for (int64_t j = 0; j < n; j++) {
        push_floats(L, jobs[j].y, jobs[j].n_x * m[j].rows);
        lua_seti(L, -2, j + 1);
    }
    return 1;
}

/* {w [rows][ldw], x [n_x][ldx], rows, n_x, cols, ldw, ldx} -> y [n_x][rows]; the padding of the
 * last row of each is left out */
static int run_dots(lua_State *L, const kern_ops *ops)
{
    int64_t rows = arg_count(L, "rows", 1), n_x = arg_count(L, "n_x", 1);
    int64_t cols = arg_count(L, "cols", 1);
    int64_t ldw = arg_count(L, "ldw", cols), ldx = arg_count(L, "ldx", cols);
    if (rows > KERN_ROWS || ldw < cols || ldx < cols) luaL_error(L, "dots: bad shape");
    const float *w = lguard_floats(L, "w", (rows - 1) * ldw + cols);
    const float *x = lguard_floats(L, "x", (n_x - 1) * ldx + cols);
    float *y = lguard_new(L, (size_t)(n_x * rows) * sizeof *y);
    ops->dots(w, ldw, (int)rows, x, ldx, n_x, cols, y, rows);
    return push_floats(L, y, n_x * rows);
}

static int run_rms_norm(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    float *x = lguard_array(L, "x", sizeof *x, &n);
    const float *weight = lguard_array(L, "weight", sizeof *weight, NULL);
    ops->rms_norm(x, weight, n, arg_number(L, "eps"), x);
    return push_floats(L, x, n);
}

static int run_l2_norm(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    float *x = lguard_array(L, "x", sizeof *x, &n);
    ops->l2_norm(x, n, arg_number(L, "eps"), arg_number(L, "scale"), x);
    return push_floats(L, x, n);
}

static int run_silu(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    float *x = lguard_array(L, "x", sizeof *x, &n);
    ops->silu(x, n);
    return push_floats(L, x, n);
}

static int run_silu_mul(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    float *gate = lguard_array(L, "gate", sizeof *gate, &n);
    ops->silu_mul(gate, lguard_floats(L, "up", n), n);
    return push_floats(L, gate, n);
}

static int run_sigmoid_mul(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    float *x = lguard_array(L, "x", sizeof *x, &n);
    ops->sigmoid_mul(x, lguard_floats(L, "gate", n), n);
    return push_floats(L, x, n);
}

static int run_axpy(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    float *y = lguard_array(L, "y", sizeof *y, &n);
    ops->axpy(arg_number(L, "a"), lguard_floats(L, "x", n), y, n);
    return push_floats(L, y, n);
}

/* {x} -> probabilities, max + ln(sum) */
static int run_softmax(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    float *x = lguard_array(L, "x", sizeof *x, &n);
    float lse = ops->softmax(x, n);
    push_floats(L, x, n);
    lua_pushnumber(L, lse);
    return 2;
}

/* {rows [k][n], w [n][k], k} -> out [n] */
static int run_conv_silu(lua_State *L, const kern_ops *ops)
{
    enum { MAX_TAPS = 16 };
    const float *rows[MAX_TAPS];
    int64_t k = arg_count(L, "k", 1), total;
    if (k > MAX_TAPS) luaL_error(L, "'k': out of range");
    const float *w = lguard_array(L, "w", sizeof *w, &total);
    int64_t n = total / k;
    const float *all = lguard_floats(L, "rows", n * k);
    for (int64_t j = 0; j < k; j++) rows[j] = lguard_copy(L, all + j * n, (size_t)n * sizeof *all);
    float *out = lguard_new(L, (size_t)n * sizeof *out);
    ops->conv_silu(rows, w, (int)k, n, out);
    return push_floats(L, out, n);
}

/* {S [dv][dk], q, k [n][dk], v [n][dv], decay, beta [n], repeats} -> S, out [n][dv], and
 * with repeats, each of which goes on from the S before it, seconds of the fastest */
static int run_delta_rule(lua_State *L, const kern_ops *ops)
{
    int64_t n, total, repeats = arg_count(L, "repeats", 1);
    const float *decay = lguard_array(L, "decay", sizeof *decay, &n);
    const float *beta = lguard_floats(L, "beta", n);
    const float *q = lguard_array(L, "q", sizeof *q, &total);
    int64_t dk = total / n;
    const float *k = lguard_floats(L, "k", n * dk);
    float *v = lguard_array(L, "v", sizeof *v, &total);
    int64_t dv = total / n;
    float *S = lguard_floats(L, "S", dv * dk);
    kern_delta d = {q, k, v, decay, beta, n, dk, dv, 1};
    double best = 0;
    for (int64_t i = 0; i < repeats; i++) {
        double start = clock_seconds();
        ops->delta_rule(S, dk, dv, &d);
        double seconds = clock_seconds() - start;
        if (i == 0 || seconds < best) best = seconds;
    }
    push_floats(L, S, dv * dk);
    push_floats(L, v, n * dv);
    if (repeats == 1) return 2;
    lua_pushnumber(L, best);
    return 3;
}

/* The sizes behind a page of keys or values, see kern_kv. */
static void put_sizes(const kern_kv *kv, int is_values, int64_t rows, char *page)
{
    int64_t n_sizes = is_values ? rows : kern_key_parts(kv->dim) * KERN_PAGE;
    for (int64_t i = 0; i < n_sizes; i++) {
        int64_t first = is_values ? 0 : i / KERN_PAGE * KERN_KEY_PART, end = first + KERN_KEY_PART;
        uint32_t largest = 0;
        if (is_values || end > kv->dim) end = kv->dim;
        for (int64_t d = first; d < end; d++) {
            int64_t at = is_values ? i * kv->dim + d : d * KERN_PAGE + i % KERN_PAGE;
            uint32_t size = kv->is_f16 ? ((uint16_t *)(void *)page)[at] & 0x7fffu
                                       : ((uint32_t *)(void *)page)[at] & 0x7fffffffu;
            largest = size > largest ? size : largest;
        }
        if (kv->is_f16)
            ((uint16_t *)(void *)page)[kv->dim * KERN_PAGE + i] = (uint16_t)largest;
        else
            ((uint32_t *)(void *)page)[kv->dim * KERN_PAGE + i] = largest;
    }
}

/* {keys = {page, ...}, values = {page, ...}, f16, n, dim, q [n_q][dim], scale, repeats, ints, sees}
 * -> out [n_q][dim], top [n_q], sum [n_q], with repeats seconds of the fastest; with ints in
 * integers, queries seeing `sees` of the n positions. Pages are whole but for the last of the
 * values, which ends after position n. */
static int run_attend(lua_State *L, const kern_ops *ops)
{
    int64_t total, repeats = arg_count(L, "repeats", 1);
    kern_kv kv = {.n = arg_count(L, "n", 1), .dim = arg_count(L, "dim", 1)};
    lua_getfield(L, 3, "f16");
    kv.is_f16 = lua_toboolean(L, -1);
    if (kv.n > KERN_BLOCK) luaL_error(L, "'n': out of range");
    const float *q = lguard_array(L, "q", sizeof *q, &total);
    int64_t n_q = total / kv.dim, row = kv.dim * (kv.is_f16 ? 2 : 4);
    static const char *const names[] = {"keys", "values"};
    const void **pages[] = {kv.keys, kv.values};
    int64_t n_sizes = kern_key_parts(kv.dim) * KERN_PAGE;
    luaL_checkstack(L, 4 * KERN_BLOCK_PAGES, NULL);
    for (int which = 0; which < 2; which++) {
        lua_getfield(L, 3, names[which]);
        int list = lua_gettop(L);
        for (int64_t at = 0; at < kv.n; at += KERN_PAGE) {
            int64_t rows = which && kv.n - at < KERN_PAGE ? kv.n - at : KERN_PAGE;
            size_t n_bytes;
            lua_geti(L, list, at / KERN_PAGE + 1);
            const char *page = luaL_checklstring(L, -1, &n_bytes);
            if ((int64_t)n_bytes < rows * row) luaL_error(L, "'%s': short page", names[which]);
            size_t n_copied = (size_t)(KERN_PAGE * row + n_sizes * row / kv.dim);
            char *copy = memset(lguard_new(L, n_copied), 0xff, n_copied); /* NaN behind n */
            memcpy(copy, page, (size_t)(rows * row));
            put_sizes(&kv, which, rows, copy);
            pages[which][at / KERN_PAGE] = copy;
            kv.next_keys[at / KERN_PAGE] = kv.keys[at / KERN_PAGE];
            kv.next_values[at / KERN_PAGE] = kv.values[at / KERN_PAGE];
        }
    }
    float *scores = lguard_new(L, (size_t)(n_q * KERN_BLOCK) * sizeof *scores);
    kern_found found = {lguard_new(L, (size_t)n_q * sizeof(float)),
                        lguard_new(L, (size_t)n_q * sizeof(float)),
                        lguard_new(L, (size_t)total * sizeof(float))};
    float scale = arg_number(L, "scale");
    double best = 0;
    int ints = lml_get(L, 3, "ints") != LUA_TNIL && lua_toboolean(L, -1);
    int64_t row_bytes = kern_attn_query_bytes(kv.dim);
    char *rows = ints ? lguard_new(L, (size_t)(n_q * row_bytes)) : NULL;
    void *block = ints ? lguard_new(L, (size_t)kern_attn_block_bytes(kv.dim)) : NULL;
    if (ints) ops->attn->prepare(&kv, block);
    int64_t sees = arg_count(L, "sees", kv.n);
    if (sees > kv.n) luaL_error(L, "'sees': out of range");
    kv.n = sees;
    for (int64_t i = 0; i < repeats; i++) {
        double start = clock_seconds();
        for (int64_t t = 0; ints && t < n_q; t++)
            ops->attn->query(q + t * kv.dim, kv.dim, scale, rows + t * row_bytes);
        if (ints)
            ops->attn->attend(&kv, block, rows, n_q, scores, &found);
        else
            ops->attend(&kv, q, n_q, scale, scores, &found);
        double seconds = clock_seconds() - start;
        if (i == 0 || seconds < best) best = seconds;
    }
    push_floats(L, found.out, total);
    push_floats(L, found.top, n_q);
    push_floats(L, found.sum, n_q);
    if (repeats == 1) return 3;
    lua_pushnumber(L, best);
    return 4;
}

/* {b, x [n], a, acc [n]} -> acc */
static int run_axpby(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    float *acc = lguard_array(L, "acc", sizeof *acc, &n);
    ops->axpby(arg_number(L, "b"), lguard_floats(L, "x", n), arg_number(L, "a"), acc, n);
    return push_floats(L, acc, n);
}

/* {x [n], importance [n], mode, bits, group, ...} -> codes, scales, biases and decoded values of
 * one row, in the steps of error feedback */
static int run_fit(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    const float *x = lguard_array(L, "x", sizeof *x, &n);
    int weighted = lml_get(L, 3, "importance") != LUA_TNIL;
    const float *importance = weighted ? lguard_floats(L, "importance", n) : NULL;
    num_format f = lml_check_format(L, 3);
    err_info e;
    if (num_format_check(&f, n, &e)) luaL_error(L, "%s", e.text);
    size_t sizes[] = {(size_t)num_format_code_bytes(&f, n), (size_t)num_format_scale_bytes(&f, n),
                      (size_t)num_format_bias_bytes(&f, n)};
    uint8_t *out[3], *codes = lguard_new(L, (size_t)n);
    float *values = lguard_new(L, (size_t)n * sizeof *values);
    num_group *groups = lguard_new(L, (size_t)(n / f.group) * sizeof *groups);
    for (int i = 0; i < 3; i++) out[i] = lguard_new(L, sizes[i]);
    for (int64_t i = 0; i < n; i++) {
        num_group *g = &groups[i / f.group];
        if (i % f.group == 0)
            num_group_fit(&f, NUM_FIT_MSE, ops->fit, x + i, weighted ? importance + i : NULL, g);
        codes[i] = num_group_code(&f, g, x[i]);
        values[i] = num_group_value(&f, g, codes[i]);
    }
    num_row_pack(&f, groups, codes, n, out[0], out[1], out[2]);
    for (int i = 0; i < 3; i++) lua_pushlstring(L, (const char *)out[i], sizes[i]);
    push_floats(L, values, n);
    return 4;
}

static int run_f16_encode(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    const float *x = lguard_array(L, "x", sizeof *x, &n);
    uint16_t *out = lguard_new(L, (size_t)n * sizeof *out);
    ops->f16_encode(x, out, n);
    lua_pushlstring(L, (const char *)out, (size_t)n * sizeof *out);
    return 1;
}

static int run_f16_decode(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    const uint16_t *x = lguard_array(L, "x", sizeof *x, &n);
    float *out = lguard_new(L, (size_t)n * sizeof *out);
    ops->f16_decode(x, out, n);
    return push_floats(L, out, n);
}

/* -> tops, live, bad */
static int run_row_scan(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    const float *x = lguard_array(L, "x", sizeof *x, &n);
    int64_t blocks = (n + KERN_ROW_BLOCK - 1) / KERN_ROW_BLOCK;
    float *tops = lguard_new(L, (size_t)blocks * sizeof *tops);
    kern_row_found found = ops->row->scan(x, n, tops);
    push_floats(L, tops, blocks);
    lua_pushinteger(L, found.n_live);
    lua_pushboolean(L, found.is_bad);
    return 3;
}

/* -> sum, weighted, and the sum when nothing else is asked for */
static int run_row_sums(lua_State *L, const kern_ops *ops)
{
    int64_t n;
    const float *x = lguard_array(L, "x", sizeof *x, &n);
    double top = arg_number(L, "top"), scale = arg_number(L, "scale");
    double sum = 0, weighted = 0, alone = 0;
    ops->row->sums(x, n, top, scale, &sum, &weighted);
    ops->row->sums(x, n, top, scale, &alone, NULL);
    lua_pushnumber(L, sum);
    lua_pushnumber(L, weighted);
    lua_pushnumber(L, alone);
    return 3;
}

static int run_row_terms(lua_State *L, const kern_ops *ops)
{
    const float *d = lguard_floats(L, "x", KERN_ROW_TERMS);
    float *out = lguard_new(L, KERN_ROW_TERMS * sizeof *out);
    ops->row->terms(d, out);
    return push_floats(L, out, KERN_ROW_TERMS);
}

typedef int run_fn(lua_State *L, const kern_ops *ops);

static const struct op {
    const char *name;
    run_fn *run;
} op_list[] = {
    {"attend", run_attend},
    {"axpby", run_axpby},
    {"axpy", run_axpy},
    {"conv_silu", run_conv_silu},
    {"decode", run_decode},
    {"delta_rule", run_delta_rule},
    {"dots", run_dots},
    {"f16_decode", run_f16_decode},
    {"f16_encode", run_f16_encode},
    {"fit", run_fit},
    {"jobs", run_jobs},
    {"l2_norm", run_l2_norm},
    {"linear", run_linear},
    {"rms_norm", run_rms_norm},
    {"row_scan", run_row_scan},
    {"row_sums", run_row_sums},
    {"row_terms", run_row_terms},
    {"sigmoid_mul", run_sigmoid_mul},
    {"silu", run_silu},
    {"silu_mul", run_silu_mul},
    {"softmax", run_softmax},
};

static int run_op(lua_State *L, run_fn *run, const kern_ops *ops)
{
    int n = run(L, ops);
    lguard_free(L, 4, lua_gettop(L) - n);
    return n;
}

/* The index of the kernels of that name; raises when there are none here. */
static int find(lua_State *L, const char *name)
{
    for (int i = 0; i < kern_count(); i++)
        if (strcmp(kern_at(i)->name, name) == 0) return i;
    return luaL_error(L, "no kernels named '%s' here", name);
}

/* kern_run(variant, op, args) -> what the op gives */
static int kern_run(lua_State *L)
{
    const char *variant = luaL_checkstring(L, 1), *op = luaL_checkstring(L, 2);
    luaL_checktype(L, 3, LUA_TTABLE);
    const kern_ops *ops = kern_at(find(L, variant));
    for (size_t i = 0; i < sizeof op_list / sizeof *op_list; i++)
        if (strcmp(op_list[i].name, op) == 0) return run_op(L, op_list[i].run, ops);
    return luaL_error(L, "no kernel named '%s'", op);
}

/* kern_value("exp" | "sigmoid" | "softplus", x) -> number: the scalar functions */
static int kern_value(lua_State *L)
{
    static const char *const names[] = {"exp", "sigmoid", "softplus", NULL};
    static float (*const functions[])(float) = {kern_expf, kern_sigmoidf, kern_softplusf};
    int i = luaL_checkoption(L, 1, NULL, names);
    lua_pushnumber(L, functions[i]((float)luaL_checknumber(L, 2)));
    return 1;
}

/* kernels() -> {{name=, level=, usable=true}, ...}, plain C first */
static int kernels(lua_State *L)
{
    int n = kern_count();
    lua_createtable(L, n, 0);
    for (int i = 0; i < n; i++) {
        lua_createtable(L, 0, 3);
        lua_pushstring(L, kern_at(i)->name);
        lua_setfield(L, -2, "name");
        lua_pushstring(L, cpu_level_name(kern_at(i)->level));
        lua_setfield(L, -2, "level");
        lua_pushboolean(L, 1);
        lua_setfield(L, -2, "usable");
        lua_seti(L, -2, i + 1);
    }
    return 1;
}

cpu_level lml_cpu_level(lua_State *L)
{
    const char *wanted = getenv("MOONLET_CPU");
    const kern_ops *best = kern_at(kern_count() - 1);
    if (!wanted || !*wanted) return best->level;
    int level = 0;
    while (level < CPU_N_LEVELS && strcmp(wanted, cpu_level_name((cpu_level)level)) != 0) level++;
    if (level == CPU_N_LEVELS)
        luaL_error(L,
                   "MOONLET_CPU: '%s' is none of scalar, avx2, avx512base, avx512vnni, avx512, "
                   "avx512bf16, amx",
                   wanted);
    if (level > (int)best->level)
        luaL_error(L, "MOONLET_CPU: no %s here, the best there is is %s", wanted, best->name);
    return (cpu_level)level;
}

cpu_level lml_kernels_level(lua_State *L, const char *name)
{
    return kern_at(find(L, name))->level;
}

const kern_row_ops *lml_row_ops(lua_State *L)
{
    static const char key = 0;
    if (lua_rawgetp(L, LUA_REGISTRYINDEX, &key) == LUA_TNIL) {
        lua_pop(L, 1);
        lua_pushlightuserdata(L, (void *)kern_select(lml_cpu_level(L))->row);
        lua_pushvalue(L, -1);
        lua_rawsetp(L, LUA_REGISTRYINDEX, &key);
    }
    const kern_row_ops *ops = lua_touserdata(L, -1);
    lua_pop(L, 1);
    return ops;
}

/* kern_selected() -> name of the kernels that models use */
static int kern_selected(lua_State *L)
{
    lua_pushstring(L, kern_select(lml_cpu_level(L))->name);
    return 1;
}

void lml_open_kern(lua_State *L)
{
    static const luaL_Reg functions[] = {{"kernels", kernels},
                                         {"kern_run", kern_run},
                                         {"kern_value", kern_value},
                                         {"kern_selected", kern_selected},
                                         {NULL, NULL}};
    lguard_open(L);
    luaL_setfuncs(L, functions, 0);
}
