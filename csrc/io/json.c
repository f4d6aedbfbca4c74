#include "io/json.h"

#include <string.h>

#include "base/map.h"
#include "base/mem.h"
#include "io/json_build.h"
#include "io/json_c.h"
#include "io/json_check.h"

/* Deeper than any file that is ours to read. */
enum { FILE_DEPTH = 200 };

struct json_doc {
    json_value *root;
    char *repeated; /* owned; see json_repeated_key */
    map_file text;  /* of parts that are set apart */
};

json_doc *json_parse(const char *text, size_t n_bytes, const char *name, int max_depth, err_info *e)
{
    return json_parse_some(text, n_bytes, name, max_depth, SIZE_MAX, e);
}

static json_doc *parse(const char *text, size_t n_bytes, const char *name, int max_depth,
                       size_t max_values, const char *const *apart, err_info *e)
{
    json_facts facts;
    if (json_check(text, n_bytes, name, max_depth, max_values, &facts, e)) return NULL;
    if (facts.longest_leaf > INT32_MAX) {
        err_set(e, ERR_LIMIT, "%s: a string of %zu bytes, more than 2 GiB", name,
                facts.longest_leaf);
        return NULL;
    }
    json_doc *doc = mem_array(1, sizeof *doc, e);
    if (!doc) return NULL;
    if (json_build(text, n_bytes, &facts, apart, &doc->root, &doc->repeated)) {
        err_set(e, ERR_MEMORY, "%s: not enough memory for the JSON values", name);
        json_close(doc);
        return NULL;
    }
    return doc;
}

json_doc *json_parse_some(const char *text, size_t n_bytes, const char *name, int max_depth,
                          size_t max_values, err_info *e)
{
    return parse(text, n_bytes, name, max_depth, max_values, NULL, e);
}

json_doc *json_read_file(const char *path, err_info *e)
{
    map_file m;
    if (map_open(&m, path, e)) return NULL;
    json_doc *doc = json_parse((const char *)m.data, m.n_bytes, path, FILE_DEPTH, e);
    map_close(&m);
    return doc;
}

json_doc *json_read_file_apart(const char *path, const char *const *apart, err_info *e)
{
    map_file m;
    if (map_open(&m, path, e)) return NULL;
    json_doc *doc = parse((const char *)m.data, m.n_bytes, path, FILE_DEPTH, SIZE_MAX, apart, e);
    if (doc)
        doc->text = m;
    else
        map_close(&m);
    return doc;
}

void json_close(json_doc *doc)
{
    if (!doc) return;
    json_object_put(doc->root);
    mem_free(doc->repeated);
    map_close(&doc->text);
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
