/* json: JSON text in, values out; a thin layer over json-c that refuses what RFC 8259 refuses.
 *
 * A json_doc owns its values; json_value pointers are borrowed from it. Object keys keep the order
 * of the text; of equal keys the last counts, at the place of the first. An integer that does not
 * fit an int64 becomes a float; a \u escape of half a surrogate pair becomes U+FFFD.
 * Not thread-safe per document. */
#ifndef IO_JSON_H
#define IO_JSON_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct json_doc json_doc;
typedef struct json_object json_value; /* json-c's own object; NULL is JSON null */

/* Strict: no NaN, no single quotes, no raw control characters, no trailing text, valid UTF-8, at
 * most `max_depth` (1..1000) levels of arrays and objects, no U+0000 in keys. `name` (a path,
 * "request body") begins error texts, which give the byte offset, counted from 0. The text need
 * not end in NUL and is not kept. NULL on failure. */
json_doc *json_parse(const char *text, size_t n_bytes, const char *name, int max_depth,
                     err_info *e);
/* The same of text that may not be trusted: at most `max_values` values (ERR_LIMIT), as each takes
 * a thousand times the bytes it is written in; those that take much longer than others (arrays,
 * objects, members) count as four. */
json_doc *json_parse_some(const char *text, size_t n_bytes, const char *name, int max_depth,
                          size_t max_values, err_info *e);
json_doc *json_read_file(const char *path, err_info *e);
/* The same, but of objects and arrays of these names (ended by NULL) that are members of a member
 * of the root no values are built: they look empty and are read by json_each_apart. For parts of
 * hundreds of thousands of values, which would take more time and memory than all else. */
json_doc *json_read_file_apart(const char *path, const char *const *apart, err_info *e);
void json_close(json_doc *doc);
json_value *json_root(const json_doc *doc);

/* A key that the root object has twice; NULL if there is none. */
const char *json_repeated_key(const json_doc *doc);

typedef enum json_type {
    JSON_NULL,
    JSON_BOOL,
    JSON_INT,
    JSON_FLOAT,
    JSON_STRING,
    JSON_ARRAY,
    JSON_OBJECT
} json_type;

json_type json_type_of(const json_value *v);
json_value *json_get(const json_value *object, const char *key); /* NULL if absent or no object */
int json_has(const json_value *object, const char *key);
size_t json_length(const json_value *array_or_object);
json_value *json_at(const json_value *array, size_t i);

/* Leaves; `fallback` when v is null or of another type. Integers written as 1.0 are floats. */
int64_t json_int(const json_value *v, int64_t fallback);
double json_float(const json_value *v, double fallback); /* integers too */
int json_bool(const json_value *v, int fallback);
const char *json_string(const json_value *v, size_t *n_bytes); /* NULL if no string */

/* Calls fn for each member in order; stops when it returns non-zero and returns that. */
int json_each(const json_value *object,
              int (*fn)(void *ctx, const char *key, size_t key_bytes, json_value *v), void *ctx);

/* What an object or array holds that was set apart: how many members or elements, and each in order
 * (without a key in an array), made for the call of fn. Stops and returns as json_each, or fails
 * with ERR_MEMORY. Of equal keys all come. */
size_t json_apart_length(const json_value *apart);
int json_each_apart(const json_value *apart,
                    int (*fn)(void *ctx, const char *key, size_t key_bytes, json_value *v),
                    void *ctx, err_info *e);

/* ---- writing ---------------------------------------------------------------------------- */

/* s in double quotes, escaped as Python's json.dumps does (`ascii`: its ensure_ascii); what is not
 * UTF-8 becomes U+FFFD. Writes at most 6 * n_bytes + 2 bytes, no NUL; returns how many. */
size_t json_quote(char *out, const char *s, size_t n_bytes, int ascii);

enum { JSON_FLOAT_BYTES = 32 };

/* A finite x as Python's repr spells it: the shortest digits that read back as x, "1.0", "1e+16",
 * "1e-05". NUL behind it; returns the length. */
size_t json_float_text(char out[JSON_FLOAT_BYTES], double x);

#endif
