#include "io/json.h"

/* json-c has a type of each of these names. */
#define json_type json_c_type
#define json_bool json_c_bool
#include <json-c/json.h>
#undef json_type
#undef json_bool

#include <string.h>

#include "base/map.h"
#include "base/mem.h"
#include "io/json_check.h"

/* Deeper than any file that is ours to read. */
enum { FILE_DEPTH = 200 };

struct json_doc {
    json_value *root;
    char *repeated; /* owned; see json_repeated_key */
};

/* json-c's errors are not the text's: json_check has passed it. */
static err_code build_failed(struct json_tokener *tok, const char *name, err_info *e)
{
    return err_set(e, ERR_MEMORY, "%s: cannot build JSON values: %s", name,
                   json_tokener_error_desc(json_tokener_get_error(tok)));
}

/* n_bytes of checked text, no space around it. JSON null is a NULL value with ERR_NONE. */
static err_code build(const char *text, size_t n_bytes, const char *name, json_value **value,
                      err_info *e)
{
    if (n_bytes > INT32_MAX)
        return err_set(e, ERR_LIMIT, "%s: more than 2 GiB of JSON text", name);
    struct json_tokener *tok = json_tokener_new_ex(JSON_MAX_DEPTH + 2);
    if (!tok) return err_set(e, ERR_MEMORY, "%s: cannot allocate a JSON parser", name);
    err_code code = ERR_NONE;
    *value = json_tokener_parse_ex(tok, text, (int)n_bytes);
    if (json_tokener_get_error(tok) == json_tokener_continue) /* a number may go on */
        *value = json_tokener_parse_ex(tok, " ", 1);
    if (json_tokener_get_error(tok) != json_tokener_success) code = build_failed(tok, name, e);
    json_tokener_free(tok);
    return code;
}

static char *put_utf8(char *out, unsigned c)
{
    if (c >= 0x10000) {
        *out++ = (char)(0xf0 | c >> 18);
        *out++ = (char)(0x80 | (c >> 12 & 0x3f));
    } else {
        *out++ = (char)(0xe0 | c >> 12); /* U+FFFD, the only other one */
    }
    *out++ = (char)(0x80 | (c >> 6 & 0x3f));
    *out++ = (char)(0x80 | (c & 0x3f));
    return out;
}

/* Copies the checked value with its edits made: "e0" behind large integers, which makes floats of
 * them, and surrogate escapes as the characters they stand for. Returns the end of the copy. */
static char *edit(char *out, const char *text, const json_facts *facts, const size_t *edits)
{
    size_t from = facts->begin;
    for (size_t i = 0; i < facts->n_edits; i++) {
        memcpy(out, text + from, edits[i] - from);
        out += edits[i] - from;
        from = edits[i];
        if (from < facts->end && text[from] == '\\') {
            int n;
            out = put_utf8(out, json_surrogate((const uint8_t *)text + from,
                                               (const uint8_t *)text + facts->end, &n));
            from += (size_t)n;
        } else {
            memcpy(out, "e0", 2);
            out += 2;
        }
    }
    memcpy(out, text + from, facts->end - from);
    return out + (facts->end - from);
}

static err_code build_edited(const char *text, size_t n_bytes, const char *name, int max_depth,
                             size_t n_edits, json_value **value, err_info *e)
{
    json_facts facts;
    size_t *edits = mem_array(n_edits, sizeof *edits, e);
    char *copy = mem_array(n_bytes + 2 * n_edits, 1, e);
    err_code code = ERR_MEMORY;
    if (edits && copy)
        code = json_check(text, n_bytes, name, max_depth, &facts, (json_marks){NULL, edits}, e);
    if (!code) {
        char *end = edit(copy, text, &facts, edits);
        code = build(copy, (size_t)(end - copy), name, value, e);
    }
    mem_free(edits);
    mem_free(copy);
    return code;
}

/* json-c keeps a repeated key at its first place, so the first written key that differs from the
 * kept one of the same rank is a repetition. */
static err_code find_repeated(json_doc *doc, const char *text, size_t n_bytes, const char *name,
                              int max_depth, size_t n_members, err_info *e)
{
    json_facts facts;
    size_t *keys = mem_array(n_members, sizeof *keys, e), i = 0;
    if (!keys) return ERR_MEMORY;
    err_code code = json_check(text, n_bytes, name, max_depth, &facts, (json_marks){keys, NULL}, e);
    struct json_object_iterator it = json_object_iter_begin(doc->root);
    struct json_object_iterator end = json_object_iter_end(doc->root);
    for (; !code && i < n_members && !doc->repeated; i++) {
        size_t at = keys[i], n = 1;
        while (text[at + n] != '"') n += text[at + n] == '\\' ? 2 : 1;
        json_doc *written = json_parse(text + at, n + 1, name, 1, e);
        const char *key = written ? json_string(written->root, &n) : NULL;
        if (!key) {
            code = ERR_MEMORY;
        } else if (!json_object_iter_equal(&it, &end) &&
                   strcmp(json_object_iter_peek_name(&it), key) == 0) {
            json_object_iter_next(&it);
        } else {
            doc->repeated = mem_copy(key, n, e);
            code = doc->repeated ? ERR_NONE : ERR_MEMORY;
        }
        json_close(written);
    }
    mem_free(keys);
    return code;
}

json_doc *json_parse(const char *text, size_t n_bytes, const char *name, int max_depth,
                     err_info *e)
{
    json_facts facts;
    if (json_check(text, n_bytes, name, max_depth, &facts, (json_marks){0}, e)) return NULL;
    json_doc *doc = mem_array(1, sizeof *doc, e);
    if (!doc) return NULL;
    err_code code;
    if (facts.n_edits)
        code = build_edited(text, n_bytes, name, max_depth, facts.n_edits, &doc->root, e);
    else
        code = build(text + facts.begin, facts.end - facts.begin, name, &doc->root, e);
    if (!code && facts.n_root_members > json_length(doc->root))
        code = find_repeated(doc, text, n_bytes, name, max_depth, facts.n_root_members, e);
    if (code) {
        json_close(doc);
        return NULL;
    }
    return doc;
}

json_doc *json_read_file(const char *path, err_info *e)
{
    map_file m;
    if (map_open(&m, path, e)) return NULL;
    json_doc *doc = json_parse((const char *)m.data, m.n_bytes, path, FILE_DEPTH, e);
    map_close(&m);
    return doc;
}

void json_close(json_doc *doc)
{
    if (!doc) return;
    json_object_put(doc->root);
    mem_free(doc->repeated);
    mem_free(doc);
}

json_value *json_root(const json_doc *doc)
{
    return doc->root;
}

const char *json_repeated_key(const json_doc *doc)
{
    return doc->repeated;
}

json_type json_type_of(const json_value *v)
{
    switch (json_object_get_type(v)) {
    case json_type_boolean: return JSON_BOOL;
    case json_type_int: return JSON_INT;
    case json_type_double: return JSON_FLOAT;
    case json_type_string: return JSON_STRING;
    case json_type_array: return JSON_ARRAY;
    case json_type_object: return JSON_OBJECT;
    case json_type_null: break;
    }
    return JSON_NULL;
}

json_value *json_get(const json_value *object, const char *key)
{
    json_value *v = NULL;
    return json_object_object_get_ex(object, key, &v) ? v : NULL;
}

int json_has(const json_value *object, const char *key)
{
    return json_object_object_get_ex(object, key, NULL) != 0;
}

size_t json_length(const json_value *v)
{
    if (json_object_is_type(v, json_type_array)) return json_object_array_length(v);
    if (json_object_is_type(v, json_type_object)) return (size_t)json_object_object_length(v);
    return 0;
}

json_value *json_at(const json_value *array, size_t i)
{
    return i < json_length(array) && json_object_is_type(array, json_type_array)
               ? json_object_array_get_idx(array, i)
               : NULL;
}

int64_t json_int(const json_value *v, int64_t fallback)
{
    return json_object_is_type(v, json_type_int) ? json_object_get_int64(v) : fallback;
}

double json_float(const json_value *v, double fallback)
{
    if (json_object_is_type(v, json_type_int)) return (double)json_object_get_int64(v);
    return json_object_is_type(v, json_type_double) ? json_object_get_double(v) : fallback;
}

int json_bool(const json_value *v, int fallback)
{
    return json_object_is_type(v, json_type_boolean) ? json_object_get_boolean(v) != 0 : fallback;
}

const char *json_string(const json_value *v, size_t *n_bytes)
{
    if (!json_object_is_type(v, json_type_string)) return NULL;
    /* json-c's getters take a plain pointer because other types cache their text; this one does
     * not. */
    json_value *s = (json_value *)(uintptr_t)v;
    if (n_bytes) *n_bytes = (size_t)json_object_get_string_len(v);
    return json_object_get_string(s);
}

int json_each(const json_value *object,
              int (*fn)(void *ctx, const char *key, size_t key_bytes, json_value *v), void *ctx)
{
    if (!json_object_is_type(object, json_type_object)) return 0;
    json_value *o = (json_value *)(uintptr_t)object;
    struct json_object_iterator it = json_object_iter_begin(o), end = json_object_iter_end(o);
    for (; !json_object_iter_equal(&it, &end); json_object_iter_next(&it)) {
        const char *key = json_object_iter_peek_name(&it);
        int stop = fn(ctx, key, strlen(key), json_object_iter_peek_value(&it));
        if (stop) return stop;
    }
    return 0;
}
