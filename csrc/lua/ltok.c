/* Tokenizers, their streams, and texts that are encoded in the background: classes
 * moonlet.tokenizer, moonlet.tokenizer_stream and moonlet.tokenizer_encoding. */
#include "lua/lml.h"

#include "base/mem.h"
#include "base/worker.h"
#include "text/tok.h"

#define TOK      "moonlet.tokenizer"
#define STREAM   "moonlet.tokenizer_stream"
#define ENCODING "moonlet.tokenizer_encoding"
#define BOX      "moonlet.tokenizer_result"

typedef struct tok_box {
    tok *t;
    int n_running; /* encodings; the last one frees what was closed meanwhile */
    int is_closed;
} tok_box;

/* A result of the C side until Lua has its copy: Lua may run out of memory in between. */
static void **push_box(lua_State *L)
{
    void **box = lua_newuserdatauv(L, sizeof *box, 0);
    *box = NULL;
    luaL_setmetatable(L, BOX);
    return box;
}

static int box_gc(lua_State *L)
{
    void **box = luaL_checkudata(L, 1, BOX);
    mem_free(*box);
    *box = NULL;
    return 0;
}

static const tok *check_tok(lua_State *L, int arg)
{
    tok_box *box = luaL_checkudata(L, arg, TOK);
    if (box->is_closed) luaL_error(L, "tokenizer is closed");
    return box->t;
}

static int core_tok_open(lua_State *L)
{
    err_info e;
    const char *path = luaL_checkstring(L, 1);
    tok_box *box = lua_newuserdatauv(L, sizeof *box, 0);
    *box = (tok_box){.is_closed = 1};
    luaL_setmetatable(L, TOK);
    box->t = tok_open(path, &e);
    box->is_closed = !box->t;
    return box->t ? 1 : lml_fail(L, &e);
}

static void free_if_unused(tok_box *box)
{
    if (!box->is_closed || box->n_running > 0) return;
    tok_close(box->t);
    box->t = NULL;
}

static int tok_gc(lua_State *L)
{
    tok_box *box = luaL_checkudata(L, 1, TOK);
    box->is_closed = 1;
    free_if_unused(box);
    return 0;
}

static lua_Integer range_end(lua_State *L, lua_Integer k, int side)
{
    int ok;
    lua_rawgeti(L, -1, side);
    lua_Integer i = lua_tointegerx(L, -1, &ok);
    if (!ok) luaL_error(L, "option 'plain': entry %I: two integers expected", k);
    lua_pop(L, 1);
    return i;
}

static tok_range check_range(lua_State *L, lua_Integer k, lua_Integer first, lua_Integer last)
{
    if (first < 1 || last < first - 1)
        luaL_error(L, "option 'plain': entry %I: %I..%I is no range", k, first, last);
    return (tok_range){(size_t)first - 1, (size_t)last};
}

/* The pairs of the list on top of the stack, which they replace. */
static const tok_range *packed_plain(lua_State *L, const int32_t *pairs, size_t n_pairs, size_t *n)
{
    if (n_pairs % 2) luaL_error(L, "option 'plain': a range without an end");
    tok_range *plain = lua_newuserdatauv(L, n_pairs / 2 * sizeof *plain + 1, 0);
    lua_replace(L, -2);
    for (size_t k = 0; k < n_pairs / 2; k++)
        plain[k] = check_range(L, (lua_Integer)k + 1, pairs[2 * k], pairs[2 * k + 1]);
    *n = n_pairs / 2;
    return plain;
}

/* options.plain: {{first, last}, ...}, positions as in string.sub, or all of them in one list of
 * class moonlet.ids; NULL and 0 when absent. */
static const tok_range *check_plain(lua_State *L, int arg, size_t *n)
{
    *n = 0;
    if (lua_isnoneornil(L, arg)) return NULL;
    if (lml_get(L, arg, "plain") == LUA_TNIL) return NULL;
    size_t n_pairs;
    const int32_t *pairs = lml_to_ids(L, -1, &n_pairs);
    if (pairs) return packed_plain(L, pairs, n_pairs, n);
    if (lua_type(L, -1) != LUA_TTABLE) luaL_error(L, "option 'plain': table expected");
    lua_Integer len = lml_len(L, -1, INT32_MAX);
    tok_range *plain = lua_newuserdatauv(L, (size_t)len * sizeof *plain + 1, 0);
    lua_insert(L, -2);
    for (lua_Integer k = 1; k <= len; k++) {
        if (lua_rawgeti(L, -1, k) != LUA_TTABLE)
            luaL_error(L, "option 'plain': entry %I: two integers expected", k);
        plain[k - 1] = check_range(L, k, range_end(L, k, 1), range_end(L, k, 2));
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    *n = (size_t)len;
    return plain;
}

typedef struct encoding {
    tok_box *owner; /* it, the text and the ranges are in the user value; NULL: not begun */
    worker *worker; /* until the end has been seen */
    const char *text;
    size_t n_bytes, n_plain, n_ids;
    const tok_range *plain;
    int special, packed; /* the result is a list of class moonlet.ids */
    int32_t *ids;
    err_code code;
    err_info error;
} encoding;

/* The arguments (tokenizer, text, options) into c; what c borrows of them is left on the stack. */
static void check_encoding_arguments(lua_State *L, encoding *c)
{
    static const char *const keys[] = {"special", "plain", "packed", NULL};
    c->text = luaL_checklstring(L, 2, &c->n_bytes);
    lml_check_keys(L, 3, keys);
    c->special = lml_opt_bool(L, 3, "special", 1);
    c->packed = lml_opt_bool(L, 3, "packed", 0);
    c->plain = check_plain(L, 3, &c->n_plain);
}

static void run_encoding(void *ctx)
{
    encoding *c = ctx;
    c->code = tok_encode(c->owner->t, c->text, c->n_bytes, c->special, c->plain, c->n_plain,
                         &c->ids, &c->n_ids, &c->error);
}

static int push_encoded(lua_State *L, encoding *c)
{
    if (c->code == ERR_RANGE) return luaL_error(L, "option 'plain': %s", c->error.text);
    if (c->code) return lml_fail(L, &c->error);
    if (c->packed)
        lml_push_id_list(L, c->ids, c->n_ids);
    else
        lml_push_ids(L, c->ids, (int64_t)c->n_ids);
    return 1;
}

static void end_encoding(encoding *c)
{
    if (!c->worker) return;
    worker_close(c->worker); /* waits */
    c->worker = NULL;
    c->owner->n_running--;
    free_if_unused(c->owner);
}

static int encoding_gc(lua_State *L)
{
    encoding *c = luaL_checkudata(L, 1, ENCODING);
    end_encoding(c);
    mem_free(c->ids);
    c->ids = NULL;
    c->code = ERR_NONE;
    c->n_ids = 0;
    return 0;
}

static int l_encode(lua_State *L)
{
    encoding given = {0};
    check_encoding_arguments(L, &given);
    encoding *c = lua_newuserdatauv(L, sizeof *c, 0);
    *c = given;
    luaL_setmetatable(L, ENCODING); /* Lua may run out of memory before it has its copy */
    check_tok(L, 1);
    c->owner = lua_touserdata(L, 1);
    run_encoding(c);
    int n = push_encoded(L, c);
    mem_free(c->ids);
    c->ids = NULL;
    return n;
}

/* tokenizer:start(text, options) -> encoding */
static int l_start(lua_State *L)
{
    encoding given = {0};
    err_info e;
    lua_settop(L, 3);
    check_encoding_arguments(L, &given);
    encoding *c = lua_newuserdatauv(L, sizeof *c, 1);
    *c = given;
    luaL_setmetatable(L, ENCODING);
    int self = lua_gettop(L);
    lua_createtable(L, 3, 0);
    for (int i = 0; i < 3; i++) {
        static const int kept[] = {1, 2, 4}; /* 4: the ranges, where there are some */
        lua_pushvalue(L, kept[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setiuservalue(L, self, 1);
    check_tok(L, 1);
    worker *w = worker_open(&e);
    if (!w) return lml_fail(L, &e);
    c->owner = lua_touserdata(L, 1);
    c->worker = w;
    c->owner->n_running++;
    worker_start(w, run_encoding, c);
    return 1;
}

static encoding *check_encoding(lua_State *L)
{
    return luaL_checkudata(L, 1, ENCODING);
}

/* encoding:fd() -> descriptor that can be read once it is done */
static int encoding_fd(lua_State *L)
{
    encoding *c = check_encoding(L);
    if (!c->worker) return luaL_error(L, "the encoding has ended");
    lua_pushinteger(L, worker_fd(c->worker));
    return 1;
}

/* encoding:result() -> ids, or nil, message, code; waits for the end */
static int encoding_result(lua_State *L)
{
    encoding *c = check_encoding(L);
    end_encoding(c);
    return push_encoded(L, c);
}

static int l_decode(lua_State *L)
{
    static const char *const keys[] = {"skip_special", NULL};
    err_info e;
    int64_t n;
    char *text;
    size_t n_bytes;
    lml_check_keys(L, 3, keys);
    int skip = lml_opt_bool(L, 3, "skip_special", 0);
    const int32_t *ids = lml_check_ids(L, 2, &n);
    void **box = push_box(L);
    if (tok_decode(check_tok(L, 1), ids, (size_t)n, skip, &text, &n_bytes, &e))
        return lml_fail(L, &e);
    *box = text;
    lua_pushlstring(L, text, n_bytes);
    mem_free(text);
    *box = NULL;
    return 1;
}

typedef struct pieces {
    lua_State *L;
    lua_Integer n;
} pieces;

static int push_pieces(lua_State *L);

/* Lua may raise while it copies a piece, and the C side holds memory then: every piece is pushed
 * in a protected call, and the error is raised again once the C side is done. */
static err_code add_piece(void *ctx, const char *piece, size_t n, err_info *e)
{
    pieces *p = ctx;
    lua_pushcfunction(p->L, push_pieces);
    lua_pushvalue(p->L, -2);
    lua_pushinteger(p->L, ++p->n);
    lua_pushlightuserdata(p->L, (void *)(uintptr_t)piece);
    lua_pushinteger(p->L, (lua_Integer)n);
    if (lua_pcall(p->L, 4, 0, 0) == LUA_OK) return ERR_NONE;
    lua_pop(p->L, 1);
    return err_set(e, ERR_MEMORY, "not enough memory for %lld pieces", (long long)p->n);
}

static int push_pieces(lua_State *L)
{
    lua_pushlstring(L, lua_touserdata(L, 3), (size_t)lua_tointeger(L, 4));
    lua_rawseti(L, 1, lua_tointeger(L, 2));
    return 0;
}

static int l_split(lua_State *L)
{
    err_info e;
    size_t n_bytes;
    const tok *t = check_tok(L, 1);
    const char *text = luaL_checklstring(L, 2, &n_bytes);
    luaL_checkstack(L, LUA_MINSTACK, NULL);
    lua_newtable(L);
    pieces p = {L, 0};
    return tok_split(t, text, n_bytes, add_piece, &p, &e) ? lml_fail(L, &e) : 1;
}

static int l_id(lua_State *L)
{
    int32_t id = tok_id(check_tok(L, 1), luaL_checkstring(L, 2));
    if (id < 0) return 0;
    lua_pushinteger(L, id);
    return 1;
}

static int32_t check_id(lua_State *L, int arg)
{
    lua_Integer id = luaL_checkinteger(L, arg);
    return id >= 0 && id <= INT32_MAX ? (int32_t)id : -1;
}

static int l_token_bytes(lua_State *L)
{
    size_t n;
    const char *bytes = tok_bytes(check_tok(L, 1), check_id(L, 2), &n);
    if (!bytes) return 0;
    lua_pushlstring(L, bytes, n);
    return 1;
}

static int l_is_special(lua_State *L)
{
    lua_pushboolean(L, tok_is_special(check_tok(L, 1), check_id(L, 2)));
    return 1;
}

static int l_n_vocab(lua_State *L)
{
    lua_pushinteger(L, tok_n_vocab(check_tok(L, 1)));
    return 1;
}

/* The stream borrows from its tokenizer, which its user value keeps and checks. */
static tok_stream *check_stream(lua_State *L)
{
    tok_stream **s = luaL_checkudata(L, 1, STREAM);
    if (!*s) luaL_error(L, "stream is closed");
    lua_getiuservalue(L, 1, 1);
    check_tok(L, -1);
    lua_pop(L, 1);
    return *s;
}

static int l_stream(lua_State *L)
{
    static const char *const keys[] = {"skip_special", NULL};
    err_info e;
    lml_check_keys(L, 2, keys);
    int skip = lml_opt_bool(L, 2, "skip_special", 0);
    tok_stream **s = lua_newuserdatauv(L, sizeof *s, 1);
    *s = NULL;
    luaL_setmetatable(L, STREAM);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    *s = tok_stream_open(check_tok(L, 1), skip, &e);
    return *s ? 1 : lml_fail(L, &e);
}

static int stream_gc(lua_State *L)
{
    tok_stream **s = luaL_checkudata(L, 1, STREAM);
    tok_stream_close(*s);
    *s = NULL;
    return 0;
}

static int stream_step(lua_State *L)
{
    err_info e;
    const char *text;
    size_t n;
    tok_stream *s = check_stream(L);
    if (tok_stream_step(s, check_id(L, 2), &text, &n, &e)) return lml_fail(L, &e);
    lua_pushlstring(L, text, n);
    return 1;
}

static int stream_finish(lua_State *L)
{
    err_info e;
    const char *text;
    size_t n;
    if (tok_stream_end(check_stream(L), &text, &n, &e)) return lml_fail(L, &e);
    lua_pushlstring(L, text, n);
    return 1;
}

void lml_open_tok(lua_State *L)
{
    static const luaL_Reg tok_methods[] = {
        {"encode", l_encode},   {"decode", l_decode},
        {"split", l_split},     {"stream", l_stream},
        {"id", l_id},           {"token_bytes", l_token_bytes},
        {"n_vocab", l_n_vocab}, {"is_special", l_is_special},
        {"close", tok_gc},      {"start", l_start},
        {NULL, NULL},
    };
    static const luaL_Reg encoding_methods[] = {
        {"fd", encoding_fd}, {"result", encoding_result}, {"close", encoding_gc}, {NULL, NULL}};
    static const luaL_Reg stream_methods[] = {
        {"step", stream_step}, {"finish", stream_finish}, {"close", stream_gc}, {NULL, NULL}};
    static const luaL_Reg none[] = {{NULL, NULL}};
    lml_class(L, TOK, tok_methods, tok_gc);
    lml_class(L, STREAM, stream_methods, stream_gc);
    lml_class(L, ENCODING, encoding_methods, encoding_gc);
    lml_class(L, BOX, none, box_gc);
    lua_pushcfunction(L, core_tok_open);
    lua_setfield(L, -2, "tok_open");
}
