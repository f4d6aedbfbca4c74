/* moonlet.core: number formats. Functions, no class. */
#include "lua/lml.h"

#include <float.h>
#include <string.h>

#include "kern/kern.h"
#include "num/fit.h"
#include "num/fp.h"

/* Also bounds the product of two sides below 2^62. */
enum { MAX_SIDE = 0x7fffffff };

/* ---- option tables ---------------------------------------------------------------------- */

static int64_t check_side(lua_State *L, int arg, const char *key)
{
    lua_Integer n = lml_opt_int(L, arg, key, 0);
    if (n < 1 || n > MAX_SIDE) luaL_error(L, "option '%s': 1 .. 2147483647 expected", key);
    return n;
}

/* The index of options[key] in the NULL-ended list. */
static int check_word(lua_State *L, int arg, const char *key, const char *fallback,
                      const char *const *words)
{
    const char *s = lml_opt_string(L, arg, key, fallback);
    if (!s) luaL_error(L, "option '%s' is missing", key);
    for (int i = 0; words[i]; i++)
        if (strcmp(words[i], s) == 0) return i;
    return luaL_error(L, "option '%s': unknown value '%s'", key, s);
}

static num_dtype check_dtype(lua_State *L, int arg, const char *key, const char *fallback)
{
    static const char *const words[] = {"f32", "f16", "bf16", NULL}; /* as num_dtype */
    return (num_dtype)check_word(L, arg, key, fallback, words);
}

static num_mode check_mode(lua_State *L, int arg)
{
    const char *name = lml_opt_string(L, arg, "mode", NULL);
    num_mode mode = NUM_F32;
    if (!name) luaL_error(L, "option 'mode' is missing");
    if (!num_mode_parse(name, &mode)) luaL_error(L, "option 'mode': unknown value '%s'", name);
    return mode;
}

/* Option zero_point: false, true or "symmetric". */
static num_zero_point check_zero_point(lua_State *L, int arg)
{
    static const char *const words[] = {"symmetric", NULL};
    int type = lml_get(L, arg, "zero_point");
    lua_pop(L, 1);
    if (type != LUA_TSTRING)
        return lml_opt_bool(L, arg, "zero_point", 0) ? NUM_ZP_INTEGER : NUM_ZP_FREE;
    check_word(L, arg, "zero_point", NULL, words);
    return NUM_ZP_SYMMETRIC;
}

num_format lml_check_format(lua_State *L, int arg)
{
    static const char *const flavours[] = {"metal", "cpu", NULL};
    static const char *const rules[] = {"ceil", "nearest", NULL};
    num_format f = num_format_default(check_mode(L, arg));
    lua_Integer bits = lml_opt_int(L, arg, "bits", f.bits);
    f.bits = bits < 0 || bits > 64 ? 0 : (int)bits;
    if (f.mode == NUM_FP8) f.group = lml_opt_int(L, arg, "cols", 0);
    f.group = lml_opt_int(L, arg, "group", f.group);
    f.scale_dtype = check_dtype(L, arg, "scale_dtype", "bf16");
    f.flavour = (num_flavour)check_word(L, arg, "flavour", "metal", flavours);
    f.mx_rule = (num_mx_rule)check_word(L, arg, "mx_rule", "ceil", rules);
    f.global_scale = (float)lml_opt_number(L, arg, "global_scale", 0);
    lua_Integer least = lml_opt_int(L, arg, "least_scale", 0);
    f.least_scale = least < 0 || least > 255 ? 255 : (uint8_t)least;
    f.zero_point = check_zero_point(L, arg);
    return f;
}

num_fit lml_check_fit(lua_State *L, int arg, int *imatrix)
{
    static const char *const words[] = {"minmax",  "mse",          "imatrix",
                                        "qstream", "qstream-amax", NULL};
    static const num_fit fits[] = {NUM_FIT_MINMAX, NUM_FIT_MSE, NUM_FIT_MSE, NUM_FIT_QSTREAM,
                                   NUM_FIT_QSTREAM_AMAX};
    int word = check_word(L, arg, "fit", "minmax", words);
    *imatrix = word == 2;
    return fits[word];
}

void lml_check_importance(lua_State *L, const float *h, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!(h[i] >= 0 && h[i] <= FLT_MAX))
            luaL_error(L, "option 'importance': weight %I is %f", (LUAI_UACINT)i, (double)h[i]);
}

static const uint8_t *check_bytes(lua_State *L, int arg, const char *what, int64_t expected)
{
    size_t n;
    const char *s = luaL_checklstring(L, arg, &n);
    if ((int64_t)n != expected)
        luaL_error(L, "%s: %I bytes expected, got %I", what, (LUAI_UACINT)expected, (LUAI_UACINT)n);
    return (const uint8_t *)s;
}

/* The bytes at table[key], kept alive by the table; NULL when there are none and none needed. */
static const uint8_t *check_part(lua_State *L, int arg, const char *key, int64_t expected)
{
    const uint8_t *bytes = NULL;
    if (lml_get(L, arg, key) == LUA_TNIL) {
        if (expected) luaL_error(L, "'%s' is missing", key);
    } else {
        if (lua_type(L, -1) != LUA_TSTRING) luaL_error(L, "'%s': string expected", key);
        if (!expected) luaL_error(L, "this mode has no '%s'", key);
        bytes = check_bytes(L, -1, key, expected);
    }
    lua_pop(L, 1);
    return bytes;
}

/* ---- functions -------------------------------------------------------------------------- */

static uint8_t *new_bytes(lua_State *L, int64_t n)
{
    return lua_newuserdatauv(L, (size_t)n + 1, 0);
}

/* Option importance of the table at 2, f32 for every column or every weight: a copy, left on the
 * stack; *stride is what to add per row. NULL when there is none. */
static const float *check_importance(lua_State *L, int64_t rows, int64_t cols, int64_t *stride)
{
    if (lml_get(L, 2, "importance") == LUA_TNIL) return NULL;
    size_t n_bytes;
    if (lua_type(L, -1) != LUA_TSTRING) luaL_error(L, "option 'importance': string expected");
    const char *bytes = lua_tolstring(L, -1, &n_bytes);
    int64_t n = (int64_t)n_bytes / 4;
    if (n_bytes % 4 || (n != cols && n != rows * cols))
        luaL_error(L, "option 'importance': f32 of %I or %I weights expected, got %I bytes",
                   (LUAI_UACINT)cols, (LUAI_UACINT)(rows * cols), (LUAI_UACINT)n_bytes);
    float *h = (float *)new_bytes(L, n * 4);
    memcpy(h, bytes, n_bytes);
    lml_check_importance(L, h, n);
    *stride = n == cols ? 0 : cols;
    return h;
}

typedef struct fitting {
    num_fit fit;
    const num_fit_ops *ops;
    const float *importance;
    int64_t stride;
} fitting;

/* Options fit and importance of the table at 2; leaves what it needs on the stack. */
static fitting check_fitting(lua_State *L, int64_t rows, int64_t cols)
{
    fitting t = {0};
    int imatrix;
    t.fit = lml_check_fit(L, 2, &imatrix);
    t.ops = kern_select(lml_cpu_level(L))->fit;
    t.importance = check_importance(L, rows, cols, &t.stride);
    if (imatrix && !t.importance) luaL_error(L, "fit 'imatrix' needs 'importance'");
    if (!imatrix && t.importance && (t.fit == NUM_FIT_MINMAX || t.fit == NUM_FIT_MSE))
        luaL_error(L, "'importance' is for the fits imatrix and qstream");
    return t;
}

/* quantize_tensor(bytes, options) -> {weight=, scales=, biases=} | nil, message, code */
static int quantize_tensor(lua_State *L)
{
    static const char *const keys[] = {
        "rows",       "cols",    "dtype",   "mode",         "bits",        "group",      "fit",
        "importance", "flavour", "mx_rule", "global_scale", "least_scale", "zero_point", NULL};
    luaL_checktype(L, 2, LUA_TTABLE);
    lml_check_keys(L, 2, keys);
    int64_t rows = check_side(L, 2, "rows"), cols = check_side(L, 2, "cols");
    num_dtype dtype = check_dtype(L, 2, "dtype", "f32");
    num_format f = lml_check_format(L, 2);
    f.scale_dtype = dtype;
    int64_t in_bytes = rows * cols;
    if (in_bytes > INT64_MAX / 4) luaL_error(L, "rows * cols is out of range");
    lua_settop(L, 2);
    fitting t = check_fitting(L, rows, cols);
    err_info e;
    if (num_format_check(&f, cols, &e) || num_fit_check(&f, t.fit, &e)) return lml_fail(L, &e);
    const uint8_t *in = check_bytes(L, 1, "tensor", in_bytes * num_dtype_bytes(dtype));

    static const char *const parts[] = {"weight", "scales", "biases"};
    int64_t sizes[] = {num_format_code_bytes(&f, cols), num_format_scale_bytes(&f, cols),
                       num_format_bias_bytes(&f, cols)};
    float *row = (float *)new_bytes(L, cols * 4);
    uint8_t *out[3]; /* on the stack, too */
    for (int i = 0; i < 3; i++) out[i] = new_bytes(L, rows * sizes[i]);
    for (int64_t r = 0; r < rows; r++) {
        const float *importance = t.importance ? t.importance + r * t.stride : NULL;
        num_elements_decode(in, dtype, r * cols, cols, row);
        int64_t bad = num_fit_row(&f, t.fit, t.ops, row, importance, cols, out[0] + r * sizes[0],
                                  out[1] + r * sizes[1], out[2] + r * sizes[2]);
        if (bad >= 0) {
            err_set(&e, ERR_RANGE, "row %lld, column %lld: %s cannot hold %g", (long long)r,
                    (long long)bad, num_mode_name(f.mode), (double)row[bad]);
            return lml_fail(L, &e);
        }
    }
    lua_createtable(L, 0, 3);
    for (int i = 0; i < 3 && sizes[i]; i++) {
        lua_pushlstring(L, (const char *)out[i], (size_t)(rows * sizes[i]));
        lua_setfield(L, -2, parts[i]);
    }
    return 1;
}

/* All rows of m as a string of elements of `dtype`. */
static int push_decoded(lua_State *L, const num_matrix *m, num_dtype dtype)
{
    int64_t row_bytes = m->cols * num_dtype_bytes(dtype);
    float *row = (float *)new_bytes(L, m->cols * 4);
    uint8_t *out = new_bytes(L, m->rows * row_bytes);
    for (int64_t r = 0; r < m->rows; r++) {
        num_row_decode(m, r, row);
        num_elements_encode(row, m->cols, dtype, out + r * row_bytes);
    }
    lua_pushlstring(L, (const char *)out, (size_t)(m->rows * row_bytes));
    return 1;
}

/* dequantize_tensor({weight=, scales=, biases=}, options) -> bytes | nil, message, code */
static int dequantize_tensor(lua_State *L)
{
    static const char *const part_keys[] = {"weight", "scales", "biases", NULL};
    static const char *const keys[] = {"rows",       "cols",  "mode",        "bits",
                                       "group",      "dtype", "scale_dtype", "global_scale",
                                       "zero_point", NULL};
    luaL_checktype(L, 1, LUA_TTABLE);
    luaL_checktype(L, 2, LUA_TTABLE);
    lml_check_keys(L, 1, part_keys);
    lml_check_keys(L, 2, keys);
    int64_t rows = check_side(L, 2, "rows"), cols = check_side(L, 2, "cols");
    num_format f = lml_check_format(L, 2);
    num_dtype dtype = check_dtype(L, 2, "dtype", "f32");
    static const char *const names[] = {"f32", "f16", "bf16"};
    f.scale_dtype = check_dtype(L, 2, "scale_dtype", names[dtype]);
    err_info e;
    if (num_format_check(&f, cols, &e)) return lml_fail(L, &e);
    const uint8_t *codes = check_part(L, 1, "weight", rows * num_format_code_bytes(&f, cols));
    const uint8_t *scales = check_part(L, 1, "scales", rows * num_format_scale_bytes(&f, cols));
    const uint8_t *biases = check_part(L, 1, "biases", rows * num_format_bias_bytes(&f, cols));
    num_matrix m = num_format_matrix(&f, rows, cols, codes, scales, biases);
    return push_decoded(L, &m, dtype);
}

static int check_bits(lua_State *L, int arg, num_mode mode)
{
    int fixed = num_format_default(mode).bits; /* 4 for the modes it does not know */
    if (mode == NUM_F32) fixed = 32;
    if (mode == NUM_F16 || mode == NUM_BF16) fixed = 16;
    if (mode == NUM_FP8) fixed = 8;
    lua_Integer bits = lml_opt_int(L, arg, "bits", fixed);
    if (mode == NUM_AFFINE ? bits < 1 || bits > 8 : bits != fixed)
        luaL_error(L, "option 'bits': out of range");
    return (int)bits;
}

void lml_check_matrix(lua_State *L, int arg, num_matrix *m)
{
    static const char *const keys[] = {
        "mode",        "bits",       "rows",    "cols",  "group",  "tile_rows", "row_bytes",
        "scale_dtype", "bias_dtype", "divisor", "codes", "scales", "biases",    NULL};
    luaL_checktype(L, arg, LUA_TTABLE);
    lml_check_keys(L, arg, keys);
    num_mode mode = check_mode(L, arg);
    int plain = mode <= NUM_BF16;
    *m = (num_matrix){.mode = mode, .scale_dtype = NUM_DT_U8, .bias_dtype = NUM_DT_U8};
    m->bits = check_bits(L, arg, mode);
    m->rows = check_side(L, arg, "rows");
    m->cols = check_side(L, arg, "cols");
    m->group = plain ? m->cols : check_side(L, arg, "group");
    m->tile_rows = mode == NUM_FP8 ? check_side(L, arg, "tile_rows") : 1;
    if (mode != NUM_FP8 && m->cols % m->group != 0) luaL_error(L, "'group' must divide 'cols'");
    int64_t least = (m->cols * m->bits + 7) / 8;
    m->row_bytes = lml_opt_int(L, arg, "row_bytes", least);
    if (m->row_bytes < least || m->row_bytes > INT64_MAX / m->rows)
        luaL_error(L, "option 'row_bytes': out of range");
    if (mode == NUM_AFFINE || mode == NUM_FP8)
        m->scale_dtype = check_dtype(L, arg, "scale_dtype", "bf16");
    if (mode == NUM_AFFINE) m->bias_dtype = check_dtype(L, arg, "bias_dtype", "bf16");
    m->divisor = (float)lml_opt_number(L, arg, "divisor", 1);
    /* Codes that are there also bound the number of scales. */
    m->codes = check_part(L, arg, "codes", m->rows * m->row_bytes);
    int64_t n_scales =
        (m->rows + m->tile_rows - 1) / m->tile_rows * ((m->cols + m->group - 1) / m->group);
    int64_t scale_bytes = plain ? 0 : num_dtype_bytes(m->scale_dtype);
    int64_t bias_bytes = mode == NUM_AFFINE ? num_dtype_bytes(m->bias_dtype) : 0;
    m->scales = check_part(L, arg, "scales", n_scales * scale_bytes);
    m->biases = check_part(L, arg, "biases", n_scales * bias_bytes);
}

/* decode_rows(matrix) -> f32 bytes, by the definition that the kernels are compared with */
static int decode_rows(lua_State *L)
{
    num_matrix m;
    lml_check_matrix(L, 1, &m);
    return push_decoded(L, &m, NUM_DT_F32);
}

void lml_open_num(lua_State *L)
{
    static const luaL_Reg functions[] = {{"quantize_tensor", quantize_tensor},
                                         {"dequantize_tensor", dequantize_tensor},
                                         {"decode_rows", decode_rows},
                                         {NULL, NULL}};
    luaL_setfuncs(L, functions, 0);
}
