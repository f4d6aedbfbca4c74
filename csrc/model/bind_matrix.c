/* One module's matrix, in whatever format its tensors are. The tensors decide: with the logical
 * shape known from the model, code words and scales leave one reading. config.json is then held
 * against it, because a contradiction means that one of the two is broken.
 *
 * MLX layout: mlx/ops.cpp (quantize) and mlx-lm utils.py (load_model); global_scale of expert
 * stacks: value = scale * code * global_scale / (448 * 6). */
#include "model/bind.h"

#include <math.h>
#include <string.h>

#include "base/mem.h"

/* ---- config.json ---------------------------------------------------------------------------- */

static const json_value *quant_block(const json_value *root, const char *key)
{
    const json_value *v = json_get(root, key);
    if (json_type_of(v) != JSON_OBJECT) v = json_get(json_get(root, "text_config"), key);
    return json_type_of(v) == JSON_OBJECT ? v : NULL;
}

static err_code read_quant_blocks(binder *b, const json_value *root)
{
    b->mlx = quant_block(root, "quantization");
    const json_value *config = quant_block(root, "quantization_config");
    const char *method = json_string(json_get(config, "quant_method"), NULL);
    if (!config || (!method && b->mlx)) return ERR_NONE;
    if (!method && json_has(config, "bits") && json_has(config, "group_size")) {
        b->mlx = config;
        return ERR_NONE;
    }
    if (method && strcmp(method, "compressed-tensors") == 0) {
        b->ct = config;
        if (json_length(json_get(json_get(config, "transform_config"), "config_groups")) > 0)
            return err_set(b->e, ERR_UNSUPPORTED,
                           "config.json: quantization_config with transforms (rotated weights) is "
                           "not supported");
        return ERR_NONE;
    }
    if (method && strcmp(method, "fp8") == 0) {
        const json_value *block = json_get(config, "weight_block_size");
        for (size_t i = 0; i < 2; i++) b->fp8_block[i] = json_int(json_at(block, i), 0);
        return ERR_NONE;
    }
    return err_set(b->e, ERR_UNSUPPORTED,
                   "config.json: quant_method \"%.60s\" is not supported (MLX, compressed-tensors "
                   "and fp8 are)",
                   method ? method : "");
}

err_code bind_open(binder *b, const st_set *set, const json_value *root, err_info *e)
{
    memset(b, 0, sizeof *b);
    b->set = set;
    b->e = e;
    b->used = mem_array((size_t)st_count(set), 1, e);
    if (!b->used) return ERR_MEMORY;
    const json_value *tie = json_get(root, "tie_word_embeddings");
    if (!tie) tie = json_get(json_get(root, "text_config"), "tie_word_embeddings");
    b->says_untied = json_type_of(tie) == JSON_BOOL && !json_bool(tie, 0);
    return read_quant_blocks(b, root);
}

void bind_close(binder *b)
{
    mem_free(b->used);
    b->used = NULL;
}

/* The entry of a module in the MLX block. Its paths are MLX's own module paths even where the
 * tensors carry Hugging Face names; files with Hugging Face paths exist too. */
static const json_value *mlx_entry(const binder *b, const char *module, int *found)
{
    static const char *const prefixes[] = {"language_model.model.", "model.language_model.",
                                           "model."};
    size_t n = strlen(b->prefix);
    char path[BIND_NAME];
    *found = 1;
    if (json_has(b->mlx, module)) return json_get(b->mlx, module);
    if (strncmp(module, b->prefix, n) == 0)
        for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
            bind_join(path, prefixes[i], module + n);
            if (json_has(b->mlx, path)) return json_get(b->mlx, path);
        }
    if (strncmp(module, "language_model.", 15) == 0 && json_has(b->mlx, module + 15))
        return json_get(b->mlx, module + 15);
    bind_join(path, "language_model.", module);
    *found = json_has(b->mlx, path);
    return json_get(b->mlx, path);
}

/* Entries do not inherit: a missing mode means affine whatever the global mode is. Fields that are
 * null or missing (mixed recipes write null) claim nothing. */
static err_code mlx_check(binder *b, const char *module, const num_matrix *m)
{
    int found = 0, quantized = m->mode >= NUM_AFFINE;
    const json_value *entry = b->mlx ? mlx_entry(b, module, &found) : NULL;
    if (!found || json_type_of(entry) == JSON_NULL) return ERR_NONE;
    if (json_type_of(entry) == JSON_BOOL) {
        if (json_bool(entry, 0) != quantized)
            return err_set(b->e, ERR_FORMAT, "%s: the tensors are %s, config.json says %s", module,
                           quantized ? "quantized" : "plain", quantized ? "false" : "true");
        if (!quantized) return ERR_NONE;
        entry = b->mlx;
    }
    const char *mode = json_string(json_get(entry, "mode"), NULL);
    int64_t bits = json_int(json_get(entry, "bits"), m->bits);
    int64_t group = json_int(json_get(entry, "group_size"), m->group);
    if (!mode) mode = "affine";
    if (quantized && bits == m->bits && group == m->group &&
        strcmp(mode, num_mode_name(m->mode)) == 0)
        return ERR_NONE;
    return err_set(b->e, ERR_FORMAT,
                   "%s: the tensors are %s with %d bits, group %lld; config.json says %.20s with "
                   "%lld bits, group %lld",
                   module, num_mode_name(m->mode), m->bits, (long long)m->group, mode,
                   (long long)bits, (long long)group);
}

/* ---- plain ---------------------------------------------------------------------------------- */

/* [n, rows, width] or, without a stack, [rows, width]. */
static err_code check_stack(binder *b, const st_tensor *t, int64_t n, int64_t rows, int64_t width)
{
    const int64_t dims[3] = {n, rows, width};
    return n ? bind_shape(b, t, 3, dims) : bind_shape(b, t, 2, dims + 1);
}

static err_code bind_plain(binder *b, const st_tensor *t, int64_t n, int64_t rows, int64_t cols,
                           num_matrix *m)
{
    static const num_mode modes[] = {
        [NUM_DT_F32] = NUM_F32, [NUM_DT_F16] = NUM_F16, [NUM_DT_BF16] = NUM_BF16};
    int dtype = bind_float(t->dtype);
    if (dtype < 0) return bind_wrong_dtype(b, t, "F32, F16 or BF16");
    if (check_stack(b, t, n, rows, cols)) return b->e->code;
    m->mode = modes[dtype];
    m->bits = 8 * st_dtype_bytes(t->dtype);
    m->group = cols;
    m->row_bytes = cols * st_dtype_bytes(t->dtype);
    m->codes = t->data;
    return ERR_NONE;
}

/* ---- MLX ------------------------------------------------------------------------------------ */

static err_code mlx_floats(binder *b, const char *module, const st_tensor *weight,
                           const st_tensor *scales, int64_t n, int64_t rows, num_matrix *m)
{
    const st_tensor *biases = bind_find(b, module, ".biases");
    if (!biases) return bind_missing(b, module, ".biases");
    if (bind_float(scales->dtype) < 0) return bind_wrong_dtype(b, scales, "U8, F32, F16 or BF16");
    if (bind_float(biases->dtype) < 0) return bind_wrong_dtype(b, biases, "F32, F16 or BF16");
    if (check_stack(b, biases, n, rows, m->cols / m->group)) return b->e->code;
    int is_group = m->group == 32 || m->group == 64 || m->group == 128;
    if (m->bits < 1 || m->bits > 8 || m->bits == 7 || !is_group)
        return err_set(b->e, ERR_UNSUPPORTED,
                       "tensor %s: affine with %d bits, group %lld is no format of MLX",
                       weight->name, m->bits, (long long)m->group);
    m->mode = NUM_AFFINE;
    m->scale_dtype = (num_dtype)bind_float(scales->dtype);
    m->bias_dtype = (num_dtype)bind_float(biases->dtype);
    m->biases = biases->data;
    return ERR_NONE;
}

static err_code mlx_bytes(binder *b, const char *module, const st_tensor *weight, num_matrix *m)
{
    if (bind_has(b, module, ".biases"))
        return err_set(b->e, ERR_FORMAT, "tensor %s.biases: stands beside byte scales", module);
    m->scale_dtype = NUM_DT_U8;
    if (m->bits == 4 && m->group == 32)
        m->mode = NUM_MXFP4;
    else if (m->bits == 8 && m->group == 32)
        m->mode = NUM_MXFP8;
    else if (m->bits == 4 && m->group == 16)
        m->mode = NUM_NVFP4;
    else
        return err_set(b->e, ERR_UNSUPPORTED,
                       "tensor %s: byte scales with %d bits, group %lld are no format of MLX",
                       weight->name, m->bits, (long long)m->group);
    return ERR_NONE;
}

/* Does config.json announce a tensor scale for the module? Without it every weight would be off by
 * a factor that nothing else shows. */
static int says_global(const binder *b, const char *module)
{
    int found = 0;
    const json_value *entry = b->mlx ? mlx_entry(b, module, &found) : NULL;
    return found && json_bool(json_get(entry, "global_scale"), 0);
}

/* One max|W| per expert; 2688 / that is the divisor of the block scales. */
static err_code mlx_global(binder *b, const char *module, int64_t n, bind_stack *out)
{
    const st_tensor *t = bind_find(b, module, ".global_scale");
    if (!t) return says_global(b, module) ? bind_missing(b, module, ".global_scale") : ERR_NONE;
    if (out->all.mode != NUM_NVFP4)
        return err_set(b->e, ERR_FORMAT, "tensor %s: only nvfp4 has a global scale", t->name);
    if (t->dtype != ST_F32) return bind_wrong_dtype(b, t, "F32");
    const int64_t dims[1] = {n ? n : 1};
    if ((n || t->n_dims) && bind_shape(b, t, 1, dims)) return b->e->code;
    for (int64_t i = 0; i < dims[0]; i++)
        if (!(bind_float_at(t, i) > 0) || !isfinite(bind_float_at(t, i)))
            return err_set(b->e, ERR_FORMAT, "tensor %s: element %lld is no positive number",
                           t->name, (long long)i);
    out->scale = t;
    return ERR_NONE;
}

static err_code bind_mlx(binder *b, const char *module, const st_tensor *weight, int64_t n,
                         int64_t rows, bind_stack *out)
{
    num_matrix *m = &out->all;
    int n_dims = n ? 3 : 2;
    const st_tensor *scales = bind_find(b, module, ".scales");
    if (!scales) return bind_missing(b, module, ".scales");
    if (weight->dtype != ST_U32) return bind_wrong_dtype(b, weight, "U32");
    int64_t words = weight->n_dims == n_dims ? weight->shape[n_dims - 1] : 0;
    int64_t groups = scales->n_dims == n_dims ? scales->shape[n_dims - 1] : 0;
    m->bits = bind_code_bits(words, m->cols);
    if (!m->bits) words = m->cols / 8; /* what 4 bits would take, for the message */
    if (check_stack(b, weight, n, rows, words)) return b->e->code;
    if (groups < 1 || m->cols % groups) groups = m->cols < 64 ? 1 : m->cols / 64;
    if (check_stack(b, scales, n, rows, groups)) return b->e->code;
    m->group = m->cols / groups;
    m->row_bytes = words * 4;
    m->codes = weight->data;
    m->scales = scales->data;
    int is_float = bind_float(scales->dtype) >= 0;
    if (!is_float && scales->dtype != ST_U8 && scales->dtype != ST_F8_E4M3 &&
        scales->dtype != ST_F8_E8M0) /* mlx reads those as bytes */
        return bind_wrong_dtype(b, scales, "U8, F32, F16 or BF16");
    if (is_float ? mlx_floats(b, module, weight, scales, n, rows, m)
                 : mlx_bytes(b, module, weight, m))
        return b->e->code;
    b->n_mlx++;
    return mlx_global(b, module, n, out);
}

/* ---- any ------------------------------------------------------------------------------------ */

static void start_stack(bind_stack *out, int64_t n, int64_t rows, int64_t cols)
{
    memset(out, 0, sizeof *out);
    out->all.rows = (n ? n : 1) * rows;
    out->all.cols = cols;
    out->all.tile_rows = 1;
    out->all.divisor = 1;
}

static err_code refuse_if(binder *b, const char *module, const char *suffix, const char *what)
{
    if (!bind_has(b, module, suffix)) return ERR_NONE;
    return err_set(b->e, ERR_UNSUPPORTED, "tensor %s%s: %s is not supported", module, suffix, what);
}

err_code bind_module(binder *b, const char *module, int64_t n, int64_t rows, int64_t cols,
                     bind_stack *out)
{
    start_stack(out, n, rows, cols);
    num_matrix *m = &out->all;
    if (refuse_if(b, module, ".weight_g_idx", "activation order") ||
        refuse_if(b, module, ".weight_scale_2", "ModelOpt NVFP4") ||
        refuse_if(b, module, ".qweight", "GPTQ or AWQ") || refuse_if(b, module, ".bias", "a bias"))
        return b->e->code;
    int packed = bind_has(b, module, ".weight_packed"), plain = bind_has(b, module, ".weight");
    if (packed && plain)
        return err_set(b->e, ERR_FORMAT, "tensor %s.weight: stands beside %s.weight_packed", module,
                       module);
    if (packed && !n) return bind_packed(b, module, m);
    const st_tensor *weight = bind_find(b, module, ".weight");
    if (!weight) return bind_missing(b, module, ".weight");
    if (weight->dtype == ST_F8_E4M3) {
        const char *scale =
            bind_has(b, module, ".weight_scale_inv") ? ".weight_scale_inv" : ".weight_scale";
        return bind_fp8(b, module, weight, scale, n, rows, m);
    }
    err_code code = bind_has(b, module, ".scales") || weight->dtype == ST_U32
                        ? bind_mlx(b, module, weight, n, rows, out)
                        : bind_plain(b, weight, n, rows, cols, m);
    return code ? code : mlx_check(b, module, m);
}

err_code bind_fused(binder *b, const char *name, int64_t n, int64_t rows, int64_t cols,
                    bind_stack *out)
{
    start_stack(out, n, rows, cols);
    const st_tensor *t = bind_find(b, name, "");
    if (!t) return bind_missing(b, name, "");
    if (t->dtype == ST_F8_E4M3) return bind_fp8(b, name, t, "_scale_inv", n, rows, &out->all);
    return bind_plain(b, t, n, rows, cols, &out->all);
}

err_code bind_matrix(binder *b, const char *module, int64_t rows, int64_t cols, num_matrix *out)
{
    bind_stack s;
    if (bind_module(b, module, 0, rows, cols, &s)) return b->e->code;
    *out = bind_slice(&s, 0, rows, 0, rows);
    return ERR_NONE;
}

num_matrix bind_slice(const bind_stack *s, int64_t i, int64_t rows, int64_t first, int64_t n_rows)
{
    num_matrix m = s->all;
    int64_t from = i * rows + first;
    int64_t groups = (m.cols + m.group - 1) / m.group;
    m.rows = n_rows;
    m.codes += from * m.row_bytes;
    if (m.scales) m.scales += from / m.tile_rows * groups * num_dtype_bytes(m.scale_dtype);
    if (m.biases) m.biases += from * groups * num_dtype_bytes(m.bias_dtype);
    if (s->scale) m.divisor = 2688.0f / bind_float_at(s->scale, i);
    return m;
}
