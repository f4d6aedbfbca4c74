/* How a checkpoint is bound, as Lua tables: what `moonlet inspect` prints and specs check.
 *
 *   core.model_config(text)                  dimensions from the text of a config.json
 *   core.model_layout(dir [, {values=true}]) config, formats and sizes of every matrix; with
 *                                            values, also their contents as f32 bytes
 *   core.model_module(dir, name, rows, cols) one matrix by its name in the file, with values */
#include "lua/llayout.h"

#include <string.h>

#include "base/mem.h"
#include "io/json.h"
#include "io/st.h"
#include "model/bind.h"
#include "model/config.h"
#include "model/model.h"
#include "model/weights.h"

#define CLASS "moonlet.layout"

/* Everything a call opens; a userdata, so that an error raised while tables are built frees it. */
typedef struct layout {
    json_doc *json;
    st_set *set;
    model_config config;
    weights weights;
    binder binder;
} layout;

static int layout_gc(lua_State *L)
{
    layout *o = luaL_checkudata(L, 1, CLASS);
    weights_free(&o->weights);
    config_free(&o->config);
    bind_close(&o->binder);
    bind_arena_free(o->binder.arena);
    if (o->set) st_close(o->set);
    if (o->json) json_close(o->json);
    memset(o, 0, sizeof *o);
    return 0;
}

static layout *push_layout(lua_State *L)
{
    layout *o = lua_newuserdatauv(L, sizeof *o, 0);
    memset(o, 0, sizeof *o);
    luaL_setmetatable(L, CLASS);
    return o;
}

static err_code open_dir(layout *o, const char *dir, err_info *e)
{
    o->json = model_read_config(dir, e);
    if (!o->json) return e->code;
    o->set = st_open(dir, e);
    return o->set ? ERR_NONE : e->code;
}

/* ---- tables --------------------------------------------------------------------------------- */

static void set_int(lua_State *L, const char *key, int64_t n)
{
    lua_pushinteger(L, n);
    lua_setfield(L, -2, key);
}

static void set_text(lua_State *L, const char *key, const char *text)
{
    lua_pushstring(L, text);
    lua_setfield(L, -2, key);
}

static void push_config(lua_State *L, const model_config *c)
{
    const struct {
        const char *key;
        int value;
    } ints[] = {
        {"vocab_size", c->vocab_size},
        {"hidden_size", c->hidden_size},
        {"num_hidden_layers", c->n_layers},
        {"max_position_embeddings", c->max_positions},
        {"num_attention_heads", c->n_heads},
        {"num_key_value_heads", c->n_kv_heads},
        {"head_dim", c->head_dim},
        {"rotary_dim", c->rotary_dim},
        {"linear_num_key_heads", c->lin_k_heads},
        {"linear_num_value_heads", c->lin_v_heads},
        {"linear_key_head_dim", c->lin_k_dim},
        {"linear_value_head_dim", c->lin_v_dim},
        {"linear_conv_kernel_dim", c->conv_kernel},
        {"intermediate_size", c->intermediate_size},
        {"num_experts", c->n_experts},
        {"num_experts_per_tok", c->n_experts_used},
        {"moe_intermediate_size", c->moe_intermediate_size},
        {"shared_expert_intermediate_size", c->shared_intermediate_size},
        {"mtp_num_hidden_layers", c->n_mtp_layers},
    };
    lua_newtable(L);
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) set_int(L, ints[i].key, ints[i].value);
    set_text(L, "model_type", c->model_type);
    set_int(L, "n_parameters", config_parameters(c));
    lua_pushboolean(L, c->tied);
    lua_setfield(L, -2, "tie_word_embeddings");
    lua_pushnumber(L, (lua_Number)c->rms_eps);
    lua_setfield(L, -2, "rms_norm_eps");
    lua_pushnumber(L, (lua_Number)c->rope_scale);
    lua_setfield(L, -2, "rope_scale");
    lua_createtable(L, c->n_layers, 0);
    for (int i = 0; i < c->n_layers; i++) {
        lua_pushstring(L, c->is_full[i] ? "full_attention" : "linear_attention");
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "layer_types");
    lua_createtable(L, c->rotary_dim / 2, 0);
    for (int i = 0; i < c->rotary_dim / 2; i++) {
        lua_pushnumber(L, (lua_Number)c->inv_freq[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "inv_freq");
}

static const char *dtype_name(num_dtype dtype)
{
    static const char *const names[] = {
        [NUM_DT_F32] = "f32", [NUM_DT_F16] = "f16", [NUM_DT_BF16] = "bf16", [NUM_DT_U8] = "u8"};
    return names[dtype];
}

static void set_values(lua_State *L, const num_matrix *m)
{
    luaL_Buffer buffer;
    float *row = lua_newuserdatauv(L, (size_t)m->cols * sizeof *row, 0);
    luaL_buffinit(L, &buffer);
    for (int64_t r = 0; r < m->rows; r++) {
        num_row_decode(m, r, row);
        luaL_addlstring(&buffer, (const char *)row, (size_t)m->cols * sizeof *row);
    }
    luaL_pushresult(&buffer);
    lua_setfield(L, -3, "values");
    lua_pop(L, 1);
}

static void push_matrix(lua_State *L, const char *name, const num_matrix *m, int values)
{
    lua_createtable(L, 0, 12);
    set_text(L, "name", name);
    set_text(L, "mode", num_mode_name(m->mode));
    set_int(L, "bits", m->bits);
    set_int(L, "rows", m->rows);
    set_int(L, "cols", m->cols);
    set_int(L, "bytes", num_matrix_bytes(m));
    if (m->scales) {
        set_int(L, "group", m->group);
        set_int(L, "tile_rows", m->tile_rows);
        set_text(L, "scale_dtype", dtype_name(m->scale_dtype));
    }
    if (m->biases) set_text(L, "bias_dtype", dtype_name(m->bias_dtype));
    if (m->mode == NUM_NVFP4) {
        lua_pushnumber(L, (lua_Number)m->divisor);
        lua_setfield(L, -2, "divisor");
    }
    if (values) set_values(L, m);
}

typedef struct collect {
    lua_State *L; /* with the module list on top */
    int values;
    lua_Integer n;
} collect;

static int add_module(void *ctx, const char *name, const num_matrix *m)
{
    collect *k = ctx;
    push_matrix(k->L, name, m, k->values);
    lua_rawseti(k->L, -2, ++k->n);
    return 0;
}

static void set_vector(lua_State *L, const char *prefix, const char *name, const float *v,
                       int64_t n)
{
    if (!v) return;
    lua_pushfstring(L, "%s%s", prefix, name);
    lua_pushlstring(L, (const char *)v, (size_t)n * sizeof *v);
    lua_settable(L, -3);
}

static void set_layer_vectors(lua_State *L, const char *prefix, const model_config *c,
                              const layer_weights *l)
{
    int64_t heads = c->lin_v_heads, conv = (int64_t)config_conv_width(c) * c->conv_kernel;
    set_vector(L, prefix, "input_norm", l->input_norm, c->hidden_size);
    set_vector(L, prefix, "post_norm", l->post_norm, c->hidden_size);
    set_vector(L, prefix, "conv", l->gdn.conv, conv);
    set_vector(L, prefix, "neg_exp_a", l->gdn.neg_exp_a, heads);
    set_vector(L, prefix, "dt_bias", l->gdn.dt_bias, heads);
    set_vector(L, prefix, "norm", l->gdn.norm, c->lin_v_dim);
    set_vector(L, prefix, "q_norm", l->attn.q_norm, c->head_dim);
    set_vector(L, prefix, "k_norm", l->attn.k_norm, c->head_dim);
}

static void set_vectors(lua_State *L, const model_config *c, const weights *w)
{
    lua_newtable(L);
    set_vector(L, "", "norm", w->norm, c->hidden_size);
    for (int i = 0; i < c->n_layers; i++) {
        const char *prefix = lua_pushfstring(L, "layers.%d.", i);
        lua_insert(L, -2); /* below the table, where the string stays alive */
        set_layer_vectors(L, prefix, c, &w->layers[i]);
        lua_remove(L, -2);
    }
    set_vector(L, "mtp.", "norm", w->mtp.norm, c->hidden_size);
    set_vector(L, "mtp.", "norm_embedding", w->mtp.norm_embedding, c->hidden_size);
    set_vector(L, "mtp.", "norm_hidden", w->mtp.norm_hidden, c->hidden_size);
    if (w->mtp.present) set_layer_vectors(L, "mtp.layers.0.", c, &w->mtp.layer);
    lua_setfield(L, -2, "vectors");
}

void llayout_push(lua_State *L, const model_config *c, const weights *w, const st_set *set)
{
    lua_newtable(L);
    set_text(L, "family", w->family);
    set_int(L, "n_parameters", w->n_parameters);
    set_int(L, "n_ignored", w->n_ignored);
    set_int(L, "n_tensors", st_count(set));
    lua_pushboolean(L, w->tied);
    lua_setfield(L, -2, "tied");
    lua_pushboolean(L, w->mtp.present);
    lua_setfield(L, -2, "mtp");
    push_config(L, c);
    lua_setfield(L, -2, "config");
    lua_newtable(L);
    for (int i = 0; i < NUM_N_MODES; i++)
        if (w->bytes_by_mode[i]) set_int(L, num_mode_name((num_mode)i), w->bytes_by_mode[i]);
    lua_setfield(L, -2, "bytes_by_mode");
}

static void set_modules(lua_State *L, const layout *o, int values)
{
    lua_newtable(L);
    collect k = {.L = L, .values = values};
    weights_each(&o->weights, &o->config, add_module, &k);
    lua_setfield(L, -2, "modules");
    if (values) set_vectors(L, &o->config, &o->weights);
}

/* ---- calls ---------------------------------------------------------------------------------- */

static int l_model_config(lua_State *L)
{
    size_t n;
    const char *text = luaL_checklstring(L, 1, &n);
    err_info e;
    layout *o = push_layout(L);
    o->json = json_parse(text, n, "config.json", 64, &e);
    if (!o->json || config_read(&o->config, json_root(o->json), &e)) return lml_fail(L, &e);
    push_config(L, &o->config);
    return 1;
}

static int l_model_layout(lua_State *L)
{
    static const char *const keys[] = {"values", NULL};
    const char *dir = luaL_checkstring(L, 1);
    lml_check_keys(L, 2, keys);
    int values = lml_opt_bool(L, 2, "values", 0);
    err_info e;
    layout *o = push_layout(L);
    err_code code = open_dir(o, dir, &e);
    if (!code) {
        code = config_read(&o->config, json_root(o->json), &e);
        if (!code) code = weights_bind(&o->weights, &o->config, o->set, json_root(o->json), &e);
        if (code) err_prefix(&e, "%s", dir);
    }
    if (code) return lml_fail(L, &e);
    llayout_push(L, &o->config, &o->weights, o->set);
    set_modules(L, o, values);
    return 1;
}

static int l_model_module(lua_State *L)
{
    const char *dir = luaL_checkstring(L, 1), *name = luaL_checkstring(L, 2);
    lua_Integer rows = luaL_checkinteger(L, 3), cols = luaL_checkinteger(L, 4);
    luaL_argcheck(L, rows > 0 && rows < 1 << 24, 3, "out of range");
    luaL_argcheck(L, cols > 0 && cols < 1 << 24, 4, "out of range");
    err_info e;
    num_matrix m;
    layout *o = push_layout(L);
    err_code code = open_dir(o, dir, &e);
    if (!code) {
        code = bind_open(&o->binder, o->set, json_root(o->json), &e);
        if (!code) code = bind_matrix(&o->binder, name, rows, cols, &m);
        if (code) err_prefix(&e, "%s", dir);
    }
    if (code) return lml_fail(L, &e);
    push_matrix(L, name, &m, 1);
    return 1;
}

void lml_open_layout(lua_State *L)
{
    static const luaL_Reg methods[] = {{NULL, NULL}};
    static const luaL_Reg functions[] = {{"model_config", l_model_config},
                                         {"model_layout", l_model_layout},
                                         {"model_module", l_model_module},
                                         {NULL, NULL}};
    lml_class(L, CLASS, methods, layout_gc);
    luaL_setfuncs(L, functions, 0);
}
