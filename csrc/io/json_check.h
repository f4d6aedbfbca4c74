/* json_check: the grammar of RFC 8259, checked before json-c builds values.
 *
 * json-c's tokener accepts more than JSON even in its strict mode (NaN, single quotes, raw line
 * ends in strings), so what may pass is decided here. Pure; private to the io room. */
#ifndef IO_JSON_CHECK_H
#define IO_JSON_CHECK_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* Nesting that no caller may exceed: json-c frees values recursively. */
enum { JSON_MAX_DEPTH = 1000 };

/* How many plain values an array, an object or a member of one is as dear as, in Lua. */
enum { JSON_COUNTS_AS = 4 };

typedef struct json_facts {
    size_t begin;        /* of the value, behind white space */
    size_t longest_leaf; /* bytes of the longest string (keys too, with quotes) or number */
} json_facts;

err_code json_check(const char *text, size_t n_bytes, const char *name, int max_depth,
                    size_t max_values, json_facts *facts, err_info *e);

/* The value of \uXXXX at p, -1 if it is not there. */
int json_escape_value(const uint8_t *p, const uint8_t *end);

#endif
