/* Opening: tokenizer.json (and tokenizer_config.json beside it) into a struct tok.
 *
 * Strict: a component, field or flag that would change ids and is not implemented is refused by
 * name, because a tokenizer that is nearly right is worse than none. */
#include "text/tok.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/mem.h"
#include "io/json.h"
#include "text/tok_impl.h"

/* The split of a ByteLevel pre-tokenizer with use_regex (tokenizers, pre_tokenizers/byte_level.rs,
 * itself from openai/gpt-2). */
#define GPT2_PATTERN                                                                               \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

typedef struct loader {
    tok *t;
    buf spelled; /* scratch: bytes of the entry at hand */
    const char *where;
    uint32_t n_merges;
    int64_t top; /* highest id seen */
    err_info *e;
} loader;

/* A string of the file for an error text: short, on one line. */
typedef struct quoted {
    char text[44];
} quoted;

static quoted quote(const char *s, size_t n)
{
    quoted q;
    size_t most = sizeof q.text - 4, k = 0;
    for (; k < n && k < most; k++) {
        unsigned char c = (unsigned char)s[k];
        q.text[k] = (char)(c < 0x20 || c == 0x7f ? '?' : c);
    }
    if (k < n) {
        while (k > 0 && ((unsigned char)s[k] & 0xc0) == 0x80) k--;
        memcpy(q.text + k, "...", 3);
        k += 3;
    }
    q.text[k] = 0;
    return q;
}

static quoted quote_value(const json_value *v)
{
    size_t n;
    const char *s = json_string(v, &n);
    switch (json_type_of(v)) {
    case JSON_STRING: return quote(s, n);
    case JSON_NULL: return quote("null", 4);
    case JSON_ARRAY: return quote("an array", 8);
    case JSON_OBJECT: return quote("an object", 9);
    default: return json_bool(v, 0) ? quote("true", 4) : quote("a number", 8);
    }
}

static int is_string(const json_value *v, const char *want)
{
    size_t n;
    const char *s = json_string(v, &n);
    return s && n == strlen(want) && memcmp(s, want, n) == 0;
}

static int is_one_of(const char *key, size_t n, const char *const *list)
{
    for (; *list; list++)
        if (n == strlen(*list) && memcmp(key, *list, n) == 0) return 1;
    return 0;
}

/* Values that ask for nothing. */
static int is_neutral(const json_value *v)
{
    switch (json_type_of(v)) {
    case JSON_NULL: return 1;
    case JSON_BOOL: return !json_bool(v, 1);
    case JSON_INT:
    case JSON_FLOAT: return json_float(v, 1) == 0;
    case JSON_STRING: return is_string(v, "");
    default: return 0;
    }
}

/* ------------------------------------------------------------------ fields and components */

typedef struct field_check {
    const char *where;
    const char *const *known;   /* handled elsewhere, or without influence on ids */
    const char *const *neutral; /* accepted only when they ask for nothing */
    err_info *e;
} field_check;

static int check_field(void *ctx, const char *key, size_t n, json_value *v)
{
    const field_check *c = ctx;
    if (is_one_of(key, n, c->known)) return ERR_NONE;
    quoted k = quote(key, n), value = quote_value(v);
    if (!is_one_of(key, n, c->neutral))
        return (int)err_set(c->e, ERR_UNSUPPORTED, "%s.%s is not supported", c->where, k.text);
    if (is_neutral(v)) return ERR_NONE;
    return (int)err_set(c->e, ERR_UNSUPPORTED, "%s.%s: %s is not supported", c->where, k.text,
                        value.text);
}

static err_code check_fields(const json_value *object, const char *where, const char *const *known,
                             const char *const *neutral, err_info *e)
{
    field_check c = {where, known, neutral, e};
    if (json_type_of(object) != JSON_OBJECT)
        return err_set(e, ERR_FORMAT, "%s: object expected", where);
    return (err_code)json_each(object, check_field, &c);
}

static const char *const nothing[] = {NULL};

static err_code refuse_type(const json_value *component, const char *where, err_info *e)
{
    quoted q = quote_value(json_get(component, "type"));
    return err_set(e, ERR_UNSUPPORTED, "%s: type %s is not supported", where, q.text);
}

static err_code load_normalizer(loader *l, const json_value *v)
{
    static const char *const known[] = {"type", NULL};
    if (json_type_of(v) == JSON_NULL) return ERR_NONE;
    if (!is_string(json_get(v, "type"), "NFC")) return refuse_type(v, "normalizer", l->e);
    l->t->nfc = 1;
    return check_fields(v, "normalizer", known, nothing, l->e);
}

static err_code open_pattern(loader *l, const char *pattern, size_t n)
{
    l->t->pretok = pretok_open(pattern, n, l->e);
    return l->t->pretok ? ERR_NONE : err_prefix(l->e, "pre_tokenizer");
}

/* As a pre-tokenizer: the byte alphabet (which every entry is spelled in) and GPT-2's split. */
static err_code load_byte_level(loader *l, const json_value *v)
{
    static const char *const known[] = {"type", "trim_offsets", "use_regex", NULL};
    static const char *const neutral[] = {"add_prefix_space", NULL};
    if (!is_string(json_get(v, "type"), "ByteLevel")) return refuse_type(v, "pre_tokenizer", l->e);
    err_code c = check_fields(v, "pre_tokenizer.ByteLevel", known, neutral, l->e);
    if (c || !json_bool(json_get(v, "use_regex"), 1)) return c;
    if (l->t->pretok)
        return err_set(l->e, ERR_UNSUPPORTED,
                       "pre_tokenizer: ByteLevel with use_regex behind a Split is not supported");
    return open_pattern(l, GPT2_PATTERN, strlen(GPT2_PATTERN));
}

static err_code load_split(loader *l, const json_value *v)
{
    static const char *const known[] = {"type", "pattern", "behavior", NULL};
    static const char *const neutral[] = {"invert", NULL};
    if (!is_string(json_get(v, "type"), "Split")) return refuse_type(v, "pre_tokenizer", l->e);
    err_code c = check_fields(v, "pre_tokenizer.Split", known, neutral, l->e);
    if (c) return c;
    quoted behaviour = quote_value(json_get(v, "behavior"));
    if (!is_string(json_get(v, "behavior"), "Isolated"))
        return err_set(l->e, ERR_UNSUPPORTED, "pre_tokenizer.Split: behavior %s is not supported",
                       behaviour.text);
    size_t n;
    const char *pattern = json_string(json_get(json_get(v, "pattern"), "Regex"), &n);
    if (!pattern)
        return err_set(l->e, ERR_UNSUPPORTED, "pre_tokenizer.Split: pattern has no Regex");
    return open_pattern(l, pattern, n);
}

/* ByteLevel, or a Sequence of it behind at most one Split. */
static err_code load_pre_tokenizer(loader *l, const json_value *v)
{
    static const char *const known[] = {"type", "pretokenizers", NULL};
    if (!is_string(json_get(v, "type"), "Sequence")) return load_byte_level(l, v);
    err_code c = check_fields(v, "pre_tokenizer", known, nothing, l->e);
    if (c) return c;
    const json_value *list = json_get(v, "pretokenizers");
    size_t n = json_type_of(list) == JSON_ARRAY ? json_length(list) : 0;
    if (n < 1 || n > 2)
        return err_set(l->e, ERR_UNSUPPORTED,
                       "pre_tokenizer: a Sequence of %zu is not supported, only ByteLevel and "
                       "Split, ByteLevel",
                       n);
    if (n == 2) c = load_split(l, json_at(list, 0));
    return c ? c : load_byte_level(l, json_at(list, n - 1));
}

/* A post-processor without influence on ids: none, ByteLevel, which only moves offsets, or a
 * TemplateProcessing that puts nothing around a single text, as transformers 5 writes it. */
static int adds_nothing(const json_value *post)
{
    if (json_type_of(post) == JSON_NULL || is_string(json_get(post, "type"), "ByteLevel")) return 1;
    const json_value *single = json_get(post, "single");
    return is_string(json_get(post, "type"), "TemplateProcessing") &&
           json_type_of(single) == JSON_ARRAY && json_length(single) == 1 &&
           is_string(json_get(json_get(json_at(single, 0), "Sequence"), "id"), "A");
}

/* Truncation and padding (training-time settings that transformers resets on every call) have no
 * influence on ids either. */
static err_code load_components(loader *l, const json_value *root)
{
    static const char *const known[] = {
        "version",       "truncation",     "padding", "added_tokens", "normalizer",
        "pre_tokenizer", "post_processor", "decoder", "model",        NULL};
    err_code c = check_fields(root, "tokenizer", known, nothing, l->e);
    if (c) return c;
    const json_value *post = json_get(root, "post_processor"), *decoder = json_get(root, "decoder");
    if (!adds_nothing(post)) return refuse_type(post, "post_processor", l->e);
    if (!is_string(json_get(decoder, "type"), "ByteLevel"))
        return refuse_type(decoder, "decoder", l->e);
    c = load_normalizer(l, json_get(root, "normalizer"));
    return c ? c : load_pre_tokenizer(l, json_get(root, "pre_tokenizer"));
}

/* ------------------------------------------------------------------ vocabulary and merges */

static err_code check_id(loader *l, quoted name, const json_value *v, int64_t *id)
{
    *id = json_int(v, -1);
    if (json_type_of(v) != JSON_INT || *id < 0 || *id >= VOCAB_MOST_IDS) {
        quoted q = quote_value(v);
        if (json_type_of(v) != JSON_INT)
            return err_set(l->e, ERR_FORMAT, "%s: id of '%s' is %s, not an integer", l->where,
                           name.text, q.text);
        return err_set(l->e, ERR_FORMAT, "%s: id %lld of '%s' is not in 0..%d", l->where,
                       (long long)*id, name.text, VOCAB_MOST_IDS - 1);
    }
    if (*id > l->top) l->top = *id;
    return ERR_NONE;
}

static int measure_entry(void *ctx, const char *key, size_t n, json_value *v)
{
    loader *l = ctx;
    int64_t id;
    return (int)check_id(l, quote(key, n), v, &id);
}

static int load_entry(void *ctx, const char *key, size_t n, json_value *v)
{
    loader *l = ctx;
    int32_t id = (int32_t)json_int(v, 0);
    l->spelled.n = 0;
    err_code c = vocab_unspell(key, n, &l->spelled, l->e);
    if (c) return (int)err_prefix(l->e, "%s: entry '%s'", l->where, quote(key, n).text);
    /* of equal keys the last counts */
    int32_t before = vocab_find(&l->t->vocab, l->spelled.data, l->spelled.n);
    if (before >= 0) l->t->vocab.entries[before].flags = 0;
    if (tok_has(l->t, id))
        return (int)err_set(l->e, ERR_FORMAT, "%s: id %d of '%s' is taken already", l->where,
                            (int)id, quote(key, n).text);
    return (int)vocab_set(&l->t->vocab, id, l->spelled.data, l->spelled.n, 0, l->e);
}

static err_code load_vocab(loader *l, const json_value *v)
{
    l->where = "model.vocab";
    if (json_type_of(v) != JSON_OBJECT)
        return err_set(l->e, ERR_FORMAT, "model.vocab: object expected");
    err_code c = (err_code)json_each_apart(v, measure_entry, l, l->e);
    if (!c) c = vocab_init(&l->t->vocab, (int32_t)(l->top + 1), json_apart_length(v), l->e);
    if (!c) c = (err_code)json_each_apart(v, load_entry, l, l->e);
    return c;
}

/* The two sides, as "a b" or ["a", "b"]; both spellings occur in published files. */
static int merge_sides(const json_value *v, const char *s[2], size_t n[2])
{
    if (json_type_of(v) == JSON_ARRAY) {
        if (json_length(v) != 2) return 0;
        s[0] = json_string(json_at(v, 0), &n[0]);
        s[1] = json_string(json_at(v, 1), &n[1]);
        return s[0] && s[1];
    }
    size_t whole;
    s[0] = json_string(v, &whole);
    const char *space = s[0] ? memchr(s[0], ' ', whole) : NULL;
    if (!space) return 0;
    n[0] = (size_t)(space - s[0]);
    s[1] = space + 1;
    n[1] = whole - n[0] - 1;
    return 1;
}

static err_code add_merge(loader *l, const json_value *v, uint32_t rank)
{
    const char *s[2];
    size_t n[2];
    if (!merge_sides(v, s, n)) return err_set(l->e, ERR_FORMAT, "two entries expected");
    const vocab *voc = &l->t->vocab;
    l->spelled.n = 0;
    size_t cut = 0;
    for (int k = 0; k < 2; k++) {
        err_code c = vocab_unspell(s[k], n[k], &l->spelled, l->e);
        if (c) return err_prefix(l->e, "'%s'", quote(s[k], n[k]).text);
        if (k == 0) cut = l->spelled.n;
    }
    const char *bytes = l->spelled.data;
    int32_t left = vocab_find(voc, bytes, cut), id = vocab_find(voc, bytes, l->spelled.n);
    int32_t right = vocab_find(voc, bytes + cut, l->spelled.n - cut);
    if (left < 0 || right < 0 || id < 0)
        return err_set(l->e, ERR_FORMAT, "'%s' + '%s': %s is not in the vocabulary",
                       quote(s[0], n[0]).text, quote(s[1], n[1]).text,
                       left < 0    ? "the first"
                       : right < 0 ? "the second"
                                   : "the result");
    bpe_add(&l->t->bpe, left, right, rank, id);
    return ERR_NONE;
}

static int load_merge(void *ctx, const char *key, size_t n, json_value *v)
{
    loader *l = ctx;
    (void)key;
    (void)n;
    err_code c = add_merge(l, v, l->n_merges);
    if (c) err_prefix(l->e, "model.merges, entry %u", (unsigned)l->n_merges);
    l->n_merges++;
    return (int)c;
}

static err_code load_merges(loader *l, const json_value *v)
{
    if (json_type_of(v) != JSON_ARRAY)
        return err_set(l->e, ERR_FORMAT, "model.merges: array expected");
    size_t n = json_apart_length(v);
    if (n > VOCAB_MOST_IDS)
        return err_set(l->e, ERR_LIMIT, "model.merges: %zu entries, at most %d", n, VOCAB_MOST_IDS);
    err_code c = bpe_init(&l->t->bpe, n, l->e);
    return c ? c : (err_code)json_each_apart(v, load_merge, l, l->e);
}

static err_code load_model(loader *l, const json_value *v)
{
    static const char *const known[] = {"type", "vocab", "merges", "fuse_unk", NULL};
    static const char *const neutral[] = {"dropout",
                                          "unk_token",
                                          "continuing_subword_prefix",
                                          "end_of_word_suffix",
                                          "byte_fallback",
                                          "ignore_merges",
                                          NULL};
    if (json_type_of(v) != JSON_OBJECT) return err_set(l->e, ERR_FORMAT, "model: object expected");
    if (!is_string(json_get(v, "type"), "BPE")) return refuse_type(v, "model", l->e);
    err_code c = check_fields(v, "model", known, neutral, l->e);
    if (!c) c = load_vocab(l, json_get(v, "vocab"));
    return c ? c : load_merges(l, json_get(v, "merges"));
}

/* ------------------------------------------------------------------ added tokens */

static int is_ascii(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] >= 0x80) return 0;
    return 1;
}

/* Token `id`, as either file declares it. Declared again (tokenizer_config.json repeats the
 * tokens of tokenizer.json), it must be the same; special in one place is special, of the other
 * flags the first count. A normalized token must be one that NFC leaves alone, so that it can be
 * traced back to raw bytes (see encode.c). */
static err_code load_added(loader *l, int32_t id, const json_value *v)
{
    static const char *const known[] = {"id", "content", "special", "normalized", "__type", NULL};
    static const char *const neutral[] = {"single_word", "lstrip", "rstrip", NULL};
    size_t n, have;
    const char *content = json_string(json_get(v, "content"), &n);
    if (!content || n == 0)
        return err_set(l->e, ERR_FORMAT, "%s: token %d has no content", l->where, (int)id);
    quoted name = quote(content, n);
    vocab *voc = &l->t->vocab;
    int special = json_bool(json_get(v, "special"), 0) ? VOCAB_SPECIAL : 0;
    int normalized = json_bool(json_get(v, "normalized"), 0) ? VOCAB_NORMALIZED : 0;
    int flags = VOCAB_ADDED | special | normalized;
    if (tok_has(l->t, id)) {
        const char *bytes = vocab_bytes(voc, id, &have);
        if (have != n || memcmp(bytes, content, n) != 0)
            return err_set(l->e, ERR_FORMAT, "%s: id %d of '%s' already stands for '%s'", l->where,
                           (int)id, name.text, quote(bytes, have).text);
        if (voc->entries[id].flags & VOCAB_ADDED) {
            voc->entries[id].flags |= (uint8_t)special;
            return ERR_NONE;
        }
    }
    err_code c = check_fields(v, l->where, known, neutral, l->e);
    if (!c && l->t->nfc && normalized && !is_ascii(content, n))
        c = err_set(l->e, ERR_UNSUPPORTED, "%s: normalized is not supported beyond ASCII",
                    l->where);
    if (c) return err_prefix(l->e, "token '%s'", name.text);
    if (tok_has(l->t, id)) {
        voc->entries[id].flags |= (uint8_t)flags;
        return ERR_NONE;
    }
    return vocab_set(voc, id, content, n, flags, l->e);
}

static err_code added_id(loader *l, const json_value *v, int64_t *id)
{
    quoted name = quote_value(json_get(v, "content"));
    return check_id(l, name, json_get(v, "id"), id);
}

static err_code load_added_tokens(loader *l, const json_value *v)
{
    l->where = "added_tokens";
    if (json_type_of(v) == JSON_NULL) return ERR_NONE;
    if (json_type_of(v) != JSON_ARRAY)
        return err_set(l->e, ERR_FORMAT, "added_tokens: array expected");
    int64_t id;
    size_t n = json_length(v);
    err_code c = ERR_NONE;
    for (size_t i = 0; i < n && !c; i++) c = added_id(l, json_at(v, i), &id);
    if (!c) c = vocab_grow(&l->t->vocab, (int32_t)(l->top + 1), l->e);
    for (size_t i = 0; i < n && !c; i++) {
        const json_value *token = json_at(v, i);
        c = load_added(l, (int32_t)json_int(json_get(token, "id"), 0), token);
    }
    return c;
}

/* The keys of added_tokens_decoder are ids in decimal. -1 for anything else. */
static int64_t decimal_id(const char *s, size_t n)
{
    int64_t id = 0;
    if (n == 0 || n > 9) return -1;
    for (size_t i = 0; i < n; i++) {
        if (s[i] < '0' || s[i] > '9') return -1;
        id = id * 10 + (s[i] - '0');
    }
    return id < VOCAB_MOST_IDS ? id : -1;
}

static int measure_config_token(void *ctx, const char *key, size_t n, json_value *v)
{
    loader *l = ctx;
    int64_t id = decimal_id(key, n);
    if (id < 0 || json_type_of(v) != JSON_OBJECT)
        return (int)err_set(l->e, ERR_FORMAT, "%s: '%s' is not an id with an object", l->where,
                            quote(key, n).text);
    if (id > l->top) l->top = id;
    return ERR_NONE;
}

static int load_config_token(void *ctx, const char *key, size_t n, json_value *v)
{
    return (int)load_added(ctx, (int32_t)decimal_id(key, n), v);
}

static err_code load_config(loader *l, const json_value *root)
{
    const json_value *v = json_get(root, "added_tokens_decoder");
    l->where = "added_tokens_decoder";
    if (json_type_of(root) != JSON_OBJECT) return err_set(l->e, ERR_FORMAT, "object expected");
    if (json_type_of(v) == JSON_NULL) return ERR_NONE;
    if (json_type_of(v) != JSON_OBJECT)
        return err_set(l->e, ERR_FORMAT, "added_tokens_decoder: object expected");
    err_code c = (err_code)json_each(v, measure_config_token, l);
    if (!c) c = vocab_grow(&l->t->vocab, (int32_t)(l->top + 1), l->e);
    return c ? c : (err_code)json_each(v, load_config_token, l);
}

/* One name for two ids would make encoding depend on the order of the file. */
static err_code check_added(loader *l)
{
    const added *a = &l->t->added;
    buf *scratch = &l->spelled;
    for (size_t i = 0; i < a->n; i++) {
        const added_token *t = &a->tokens[i];
        int twice = i > 0 && t->n == t[-1].n && memcmp(t->bytes, t[-1].bytes, t->n) == 0;
        int32_t other = twice ? t[-1].id : -1;
        scratch->n = 0;
        if (!twice && vocab_unspell(t->bytes, t->n, scratch, NULL) == ERR_NONE)
            other = vocab_find(&l->t->vocab, scratch->data, scratch->n);
        if (other >= 0 && other != t->id)
            return err_set(l->e, ERR_FORMAT, "added token '%s' has two ids, %d and %d",
                           quote(t->bytes, t->n).text, (int)other, (int)t->id);
    }
    return ERR_NONE;
}

/* ------------------------------------------------------------------ files */

static err_code load_file(loader *l, const char *path,
                          err_code (*load)(loader *l, const json_value *root))
{
    static const char *const large[] = {"vocab", "merges", NULL};
    json_doc *doc = json_read_file_apart(path, large, l->e);
    if (!doc) return l->e->code;
    err_code c = load(l, json_root(doc));
    if (c) err_prefix(l->e, "%s", path);
    json_close(doc);
    return c;
}

static err_code load_tokenizer(loader *l, const json_value *root)
{
    err_code c = load_components(l, root);
    if (!c) c = load_model(l, json_get(root, "model"));
    return c ? c : load_added_tokens(l, json_get(root, "added_tokens"));
}

static err_code load_both(loader *l, const char *path)
{
    static const char file_name[] = "tokenizer.json", config_name[] = "tokenizer_config.json";
    char file[PATH_MAX], config[PATH_MAX];
    struct stat st;
    int is_dir = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
    const char *slash = strrchr(path, '/');
    int dir_bytes = is_dir ? (int)strlen(path) : slash ? (int)(slash - path) + 1 : 0;
    const char *join = is_dir ? "/" : "";
    if (strlen(path) > sizeof config - sizeof config_name - 1)
        return err_set(l->e, ERR_IO, "path of %zu bytes is too long", strlen(path));
    snprintf(file, sizeof file, "%s%s%s", path, join, is_dir ? file_name : "");
    snprintf(config, sizeof config, "%.*s%s%s", dir_bytes, path, join, config_name);
    err_code c = load_file(l, file, load_tokenizer);
    int named = is_dir || strcmp(path + dir_bytes, file_name) == 0;
    if (!c && named && stat(config, &st) == 0) c = load_file(l, config, load_config);
    if (!c) c = added_init(&l->t->added, &l->t->vocab, l->e);
    if (!c && (c = check_added(l))) err_prefix(l->e, "%s", file);
    return c;
}

tok *tok_open(const char *path, err_info *e)
{
    err_info ours = {0};
    loader l = {.t = mem_array(1, sizeof(tok), e), .top = -1, .e = e ? e : &ours};
    if (!l.t) return NULL;
    err_code c = load_both(&l, path);
    buf_free(&l.spelled);
    if (!c) return l.t;
    tok_close(l.t);
    return NULL;
}

void tok_close(tok *t)
{
    if (!t) return;
    vocab_free(&t->vocab);
    bpe_free(&t->bpe);
    added_free(&t->added);
    pretok_close(t->pretok);
    mem_free(t);
}

/* ------------------------------------------------------------------ questions */

int32_t tok_n_vocab(const tok *t)
{
    return t->vocab.n;
}

int32_t tok_id(const tok *t, const char *token)
{
    buf bytes = {0};
    size_t n = strlen(token), len = 0;
    int32_t id = added_at(&t->added, ADDED_ANY, token, n, &len);
    if (id >= 0 && len == n) return id;
    id = -1;
    if (vocab_unspell(token, n, &bytes, NULL) == ERR_NONE)
        id = vocab_find(&t->vocab, bytes.data, bytes.n);
    buf_free(&bytes);
    return id;
}

int tok_is_special(const tok *t, int32_t id)
{
    return tok_has(t, id) && (t->vocab.entries[id].flags & VOCAB_SPECIAL) != 0;
}

const char *tok_bytes(const tok *t, int32_t id, size_t *n_bytes)
{
    *n_bytes = 0;
    return tok_has(t, id) ? vocab_bytes(&t->vocab, id, n_bytes) : NULL;
}
