/* compressed-tensors and block-scaled FP8: one module's matrix.
 *
 *   weight_packed U8   + weight_scale U8              mxfp4-pack-quantized
 *   weight_packed U8   + weight_scale F8_E4M3         nvfp4-pack-quantized, weight_global_scale
 *   weight_packed I32  + weight_scale float           pack-quantized integers, weight_shape
 *   weight F8_E4M3     + weight_scale U8              mxfp8-quantized
 *   weight F8_E4M3     + weight_scale float           float-quantized: tensor, channel or block
 *   weight F8_E4M3     + weight_scale_inv float       FP8 releases: block
 *
 * Scales of activations (input_scale, ...) are marked as used and left alone: moonlet reads such
 * files as weight-only. Layouts: compressed_tensors/compressors/ (pack_quantized/helpers.py,
 * nvfp4/helpers.py); spec/golden/ct/README.md states them in one table. */
#include "model/bind.h"

#include <math.h>
#include <string.h>

#include "num/fp.h"

static int64_t ceil_div(int64_t a, int64_t d)
{
    return a / d + (a % d != 0); /* d may be any number that config.json states */
}

static int is_e8m0(st_dtype dtype)
{
    return dtype == ST_U8 || dtype == ST_F8_E8M0;
}

static void skip_activation_scales(binder *b, const char *module)
{
    bind_find(b, module, ".input_scale");
    bind_find(b, module, ".input_global_scale");
}

/* ---- config.json ---------------------------------------------------------------------------- */

/* What the tensors of a module turned out to be. */
typedef struct scheme {
    int bits;
    const char *type; /* "int" or "float" */
    int64_t group;    /* columns per scale; 0: one scale per row, tile or tensor */
    int64_t cols;
    int has_zeros; /* zero points are there */
} scheme;

typedef struct search {
    const scheme *s;
    int found;
} search;

static int is_asymmetric_int(const json_value *args)
{
    const char *type = json_string(json_get(args, "type"), NULL);
    return (!type || strcmp(type, "int") == 0) && !json_bool(json_get(args, "symmetric"), 1);
}

/* A group lists a preset's name instead of arguments: nothing to hold the tensors against. */
static int match_group(void *ctx, const char *key, size_t key_bytes, json_value *group)
{
    (void)key;
    (void)key_bytes;
    search *q = ctx;
    const json_value *args = json_get(group, "weights");
    const char *type = json_string(json_get(args, "type"), NULL);
    int64_t size = json_int(json_get(args, "group_size"), 0);
    if (json_type_of(args) != JSON_OBJECT)
        q->found = json_type_of(group) == JSON_ARRAY;
    else
        q->found = json_int(json_get(args, "num_bits"), 8) == q->s->bits &&
                   strcmp(type ? type : "int", q->s->type) == 0 &&
                   (q->s->has_zeros || !is_asymmetric_int(args)) &&
                   (q->s->group ? size == q->s->group : size <= 0 || size == q->s->cols);
    return q->found;
}

/* Some group must declare the scheme found. Which group a module's name falls into is not asked:
 * targets and ignore lists of published files are often wrong, the tensors are not. */
static err_code check_scheme(binder *b, const char *module, const scheme *s)
{
    search q = {.s = s};
    const json_value *groups = json_get(b->ct, "config_groups");
    if (json_type_of(groups) != JSON_OBJECT) return ERR_NONE;
    json_each(groups, match_group, &q);
    if (q.found) return ERR_NONE;
    scheme asymmetric = *s; /* or would one with zero points be declared? */
    asymmetric.has_zeros = 1;
    q.s = &asymmetric;
    json_each(groups, match_group, &q);
    if (q.found) return bind_missing(b, module, ".weight_zero_point");
    return err_set(b->e, ERR_FORMAT,
                   "%s: the tensors are %s with %d bits, group %lld; no group of "
                   "quantization_config says so",
                   module, s->type, s->bits, (long long)s->group);
}

/* ---- fp4 ------------------------------------------------------------------------------------ */

static err_code bind_fp4(binder *b, const char *module, const st_tensor *packed,
                         const st_tensor *scale, num_matrix *m)
{
    m->mode = is_e8m0(scale->dtype) ? NUM_MXFP4 : NUM_NVFP4;
    m->scale_dtype = NUM_DT_U8;
    m->bits = 4;
    m->group = m->mode == NUM_MXFP4 ? 32 : 16;
    m->row_bytes = m->cols / 2;
    m->codes = packed->data;
    m->scales = scale->data;
    if (m->cols % m->group)
        return err_set(b->e, ERR_FORMAT, "%s: %lld columns are no multiple of the group of %lld",
                       module, (long long)m->cols, (long long)m->group);
    const int64_t codes[2] = {m->rows, m->cols / 2}, scales[2] = {m->rows, m->cols / m->group};
    if (bind_shape(b, packed, 2, codes) || bind_shape(b, scale, 2, scales)) return b->e->code;
    if (m->mode == NUM_NVFP4) {
        const st_tensor *g = bind_find(b, module, ".weight_global_scale");
        if (!g) return bind_missing(b, module, ".weight_global_scale");
        if (g->dtype != ST_F32) return bind_wrong_dtype(b, g, "F32");
        const int64_t one[1] = {1};
        if (g->n_dims && bind_shape(b, g, 1, one)) return b->e->code;
        m->divisor = bind_float_at(g, 0);
        if (!(m->divisor > 0) || !isfinite(m->divisor))
            return err_set(b->e, ERR_FORMAT, "tensor %s: %g is no positive number", g->name,
                           (double)m->divisor);
    }
    return check_scheme(b, module, &(scheme){.bits = 4, .type = "float", .group = m->group});
}

/* ---- integers ------------------------------------------------------------------------------- */

/* Zero points are packed down the rows: word w of column j holds rows from 32*w/bits on. */
static uint32_t zero_at(const st_tensor *zeros, int64_t row, int64_t col, int bits)
{
    int64_t n_cols = zeros->shape[1], word = row * bits / 32;
    uint8_t column[8] = {0};
    memcpy(column, zeros->data + 4 * (word * n_cols + col), 4);
    if (word + 1 < zeros->shape[0])
        memcpy(column + 4, zeros->data + 4 * ((word + 1) * n_cols + col), 4);
    uint32_t v = 0;
    for (int k = 0; k < bits; k++) {
        int64_t bit = row * bits - word * 32 + k;
        v |= (uint32_t)(column[bit >> 3] >> (bit & 7) & 1) << k;
    }
    return v;
}

/* Stored codes are unsigned, q + 2^(bits-1), and value = (q - zero) * scale, which is affine with
 * bias = -scale * zero', zero' the stored zero point. With BF16 or F16 scales the bias and
 * scale*code + bias are exact in f32; symmetric BF16 ones stay BF16, a power of two apart. */
static err_code derive_biases(binder *b, const st_tensor *scale, const st_tensor *zeros,
                              num_matrix *m)
{
    int64_t n_groups = m->cols / m->group;
    int is_bf16 = !zeros && scale->dtype == ST_BF16;
    size_t n = (size_t)(m->rows * n_groups);
    uint8_t *bias = bind_alloc(b, n, is_bf16 ? 2 : 4);
    if (!bias) return ERR_MEMORY;
    uint32_t middle = 1u << (m->bits - 1);
    for (int64_t i = 0; i < (int64_t)n; i++) {
        uint32_t zero = zeros ? zero_at(zeros, i / n_groups, i % n_groups, m->bits) : middle;
        float value = -bind_float_at(scale, i) * (float)zero;
        uint16_t half = fp_bf16_encode(value);
        if (is_bf16)
            memcpy(bias + 2 * i, &half, 2);
        else
            memcpy(bias + 4 * i, &value, 4);
    }
    m->biases = bias;
    m->bias_dtype = is_bf16 ? NUM_DT_BF16 : NUM_DT_F32;
    return ERR_NONE;
}

static err_code check_weight_shape(binder *b, const char *module, const num_matrix *m)
{
    const st_tensor *t = bind_find(b, module, ".weight_shape");
    if (!t) return bind_missing(b, module, ".weight_shape");
    if (t->dtype != ST_I64) return bind_wrong_dtype(b, t, "I64");
    const int64_t two[1] = {2};
    int64_t shape[2];
    if (bind_shape(b, t, 1, two)) return b->e->code;
    memcpy(shape, t->data, sizeof shape);
    if (shape[0] == m->rows && shape[1] == m->cols) return ERR_NONE;
    return err_set(b->e, ERR_FORMAT, "tensor %s: says [%lld, %lld], expected [%lld, %lld]", t->name,
                   (long long)shape[0], (long long)shape[1], (long long)m->rows,
                   (long long)m->cols);
}

static err_code bind_ints(binder *b, const char *module, const st_tensor *packed,
                          const st_tensor *scale, num_matrix *m)
{
    int dtype = bind_float(scale->dtype);
    if (dtype < 0) return bind_wrong_dtype(b, scale, "F32, F16 or BF16");
    if (check_weight_shape(b, module, m)) return b->e->code;
    int64_t words = packed->n_dims == 2 ? packed->shape[1] : 0;
    m->bits = bind_code_bits(words, m->cols);
    const int64_t codes[2] = {m->rows, m->bits ? words : m->cols / 8};
    if (bind_shape(b, packed, 2, codes)) return b->e->code;
    if (m->bits < 1 || m->bits > 8)
        return err_set(b->e, ERR_UNSUPPORTED,
                       "tensor %s: %lld words for %lld columns are no whole number of bits up to 8",
                       packed->name, (long long)words, (long long)m->cols);
    int64_t n_groups = scale->n_dims == 2 ? scale->shape[1] : 0;
    if (n_groups < 1 || m->cols % n_groups) n_groups = 1;
    const int64_t scales[2] = {m->rows, n_groups};
    if (bind_shape(b, scale, 2, scales)) return b->e->code;

    m->mode = NUM_AFFINE;
    m->group = m->cols / n_groups;
    m->row_bytes = words * 4;
    m->codes = packed->data;
    m->scales = scale->data;
    m->scale_dtype = (num_dtype)dtype;
    const st_tensor *zeros = bind_find(b, module, ".weight_zero_point");
    if (zeros) {
        const int64_t dims[2] = {ceil_div(m->rows * m->bits, 32), n_groups};
        if (zeros->dtype != ST_I32) return bind_wrong_dtype(b, zeros, "I32");
        if (bind_shape(b, zeros, 2, dims)) return b->e->code;
    }
    if (derive_biases(b, scale, zeros, m)) return b->e->code;
    const scheme found = {.bits = m->bits,
                          .type = "int",
                          .group = n_groups > 1 ? m->group : 0,
                          .cols = m->cols,
                          .has_zeros = zeros != NULL};
    return check_scheme(b, module, &found);
}

err_code bind_packed(binder *b, const char *module, num_matrix *m)
{
    const st_tensor *packed = bind_find(b, module, ".weight_packed");
    const st_tensor *scale = bind_find(b, module, ".weight_scale");
    if (!packed) return bind_missing(b, module, ".weight_packed");
    if (!scale) return bind_missing(b, module, ".weight_scale");
    skip_activation_scales(b, module);
    b->n_packed++;
    if (packed->dtype == ST_I32) return bind_ints(b, module, packed, scale, m);
    if (packed->dtype != ST_U8) return bind_wrong_dtype(b, packed, "U8 or I32");
    if (!is_e8m0(scale->dtype) && scale->dtype != ST_F8_E4M3)
        return bind_wrong_dtype(b, scale, "U8 or F8_E4M3");
    return bind_fp4(b, module, packed, scale, m);
}

/* ---- fp8 ------------------------------------------------------------------------------------ */

/* The block of config.json whose tiles give scales of this shape; 0 if there is none. */
typedef struct block_search {
    const num_matrix *m; /* rows of one matrix, not of the stack */
    int64_t rows, n_row_tiles, n_col_tiles, block[2];
} block_search;

static int fits(const block_search *q, int64_t h, int64_t w)
{
    return h > 0 && w > 0 && ceil_div(q->rows, h) == q->n_row_tiles &&
           ceil_div(q->m->cols, w) == q->n_col_tiles;
}

static int match_block(void *ctx, const char *key, size_t key_bytes, json_value *group)
{
    (void)key;
    (void)key_bytes;
    block_search *q = ctx;
    const json_value *block = json_get(json_get(group, "weights"), "block_structure");
    int64_t h = json_int(json_at(block, 0), 0), w = json_int(json_at(block, 1), 0);
    if (!fits(q, h, w)) return 0;
    q->block[0] = h;
    q->block[1] = w;
    return 1;
}

/* Published releases all use 128 x 128, which also serves where config.json is silent. */
static void find_block(const binder *b, block_search *q)
{
    const json_value *groups = json_get(b->ct, "config_groups");
    int64_t h = b->fp8_block[0] > 0 ? b->fp8_block[0] : 128;
    int64_t w = b->fp8_block[1] > 0 ? b->fp8_block[1] : 128;
    if (json_type_of(groups) == JSON_OBJECT && json_each(groups, match_block, q)) return;
    if (!fits(q, h, w)) return;
    q->block[0] = h;
    q->block[1] = w;
}

static err_code bind_mxfp8(binder *b, const char *module, const st_tensor *scale, int64_t n,
                           int64_t rows, num_matrix *m)
{
    m->mode = NUM_MXFP8;
    m->scale_dtype = NUM_DT_U8;
    m->group = 32;
    const int64_t dims[3] = {n, rows, ceil_div(m->cols, 32)};
    if (m->cols % 32)
        return err_set(b->e, ERR_FORMAT, "%s: %lld columns are no multiple of the group of 32",
                       module, (long long)m->cols);
    if (n ? bind_shape(b, scale, 3, dims) : bind_shape(b, scale, 2, dims + 1)) return b->e->code;
    return check_scheme(b, module, &(scheme){.bits = 8, .type = "float", .group = 32});
}

err_code bind_fp8(binder *b, const char *module, const st_tensor *weight, const char *scale_name,
                  int64_t n, int64_t rows, num_matrix *m)
{
    int64_t cols = m->cols;
    const int64_t dims[3] = {n, rows, cols};
    const st_tensor *scale = bind_find(b, module, scale_name);
    if (!scale) return bind_missing(b, module, scale_name);
    if (n ? bind_shape(b, weight, 3, dims) : bind_shape(b, weight, 2, dims + 1)) return b->e->code;
    skip_activation_scales(b, module);
    m->bits = 8;
    m->row_bytes = cols;
    m->codes = weight->data;
    m->scales = scale->data;
    if (is_e8m0(scale->dtype)) return bind_mxfp8(b, module, scale, n, rows, m);
    if (bind_float(scale->dtype) < 0) return bind_wrong_dtype(b, scale, "F32, F16, BF16 or U8");

    m->mode = NUM_FP8;
    m->scale_dtype = (num_dtype)bind_float(scale->dtype);
    block_search q = {.m = m, .rows = rows};
    if (scale->n_dims == (n ? 3 : 2)) {
        q.n_row_tiles = scale->shape[n ? 1 : 0];
        q.n_col_tiles = scale->shape[n ? 2 : 1];
    }
    if (!n && st_elements(scale) == 1) { /* the whole tensor, or a single tile */
        m->tile_rows = rows;
        m->group = cols;
    } else if (q.n_row_tiles == rows && q.n_col_tiles == 1) {
        m->group = cols;
    } else {
        find_block(b, &q);
        int64_t h = q.block[0] ? q.block[0] : 128, w = q.block[1] ? q.block[1] : 128;
        const int64_t tiles[3] = {n, ceil_div(rows, h), ceil_div(cols, w)};
        if (n ? bind_shape(b, scale, 3, tiles) : bind_shape(b, scale, 2, tiles + 1))
            return b->e->code;
        m->tile_rows = h < rows ? h : rows;
        m->group = w < cols ? w : cols;
        if (n && rows % m->tile_rows)
            return err_set(b->e, ERR_UNSUPPORTED,
                           "tensor %s: stacked matrices of %lld rows with tiles of %lld rows are "
                           "not supported",
                           scale->name, (long long)rows, (long long)h);
    }
    return check_scheme(b, module, &(scheme){.bits = 8, .type = "float", .group = 0});
}
