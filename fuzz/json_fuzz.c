/* Any bytes as JSON text: they parse, or fail with one line of text. What parses can be walked, and
 * its strings and floats, written again, read back as the same values. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "io/json.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void check_string(const char *s, size_t n_bytes)
{
    size_t n;
    char *quoted = malloc(6 * n_bytes + 2);
    if (!quoted) abort();
    for (int ascii = 0; ascii < 2; ascii++) {
        size_t n_quoted = json_quote(quoted, s, n_bytes, ascii);
        json_doc *doc = json_parse(quoted, n_quoted, "quoted", 1, NULL);
        const char *back = doc ? json_string(json_root(doc), &n) : NULL;
        if (!back || n != n_bytes || memcmp(back, s, n) != 0) abort();
        json_close(doc);
    }
    free(quoted);
}

static void check_float(double x)
{
    char text[JSON_FLOAT_BYTES];
    if (!isfinite(x)) return;
    size_t n = json_float_text(text, x);
    json_doc *doc = json_parse(text, n, "float", 1, NULL);
    if (!doc || json_type_of(json_root(doc)) != JSON_FLOAT) abort();
    if (json_float(json_root(doc), NAN) != x) abort();
    json_close(doc);
}

static int walk(void *ctx, const char *key, size_t key_bytes, json_value *v)
{
    (void)ctx;
    size_t n;
    const char *s = json_string(v, &n);
    if (key) check_string(key, key_bytes);
    if (s) check_string(s, n);
    if (json_type_of(v) == JSON_FLOAT) check_float(json_float(v, 0));
    for (size_t i = 0; json_type_of(v) == JSON_ARRAY && i < json_length(v); i++)
        walk(NULL, NULL, 0, json_at(v, i));
    return json_each(v, walk, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    err_info e = {0};
    json_doc *doc = json_parse((const char *)data, n_bytes, "input", 100, &e);
    if (doc) walk(NULL, NULL, 0, json_root(doc));
    else if (e.code == ERR_NONE || !e.text[0] || strchr(e.text, '\n')) abort();
    json_close(doc);
    return 0;
}
