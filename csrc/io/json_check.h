/* json_check: the grammar of RFC 8259, checked before json-c builds values.
 *
 * json-c's tokener accepts more than JSON even in its strict mode (NaN, single quotes, raw line
 * ends in strings) and saturates large integers, so what may pass is decided here and json-c only
 * allocates. Pure; private to the io room. */
#ifndef IO_JSON_CHECK_H
#define IO_JSON_CHECK_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* Nesting that no caller may exceed: json-c frees values recursively. */
enum { JSON_MAX_DEPTH = 1000 };

typedef struct json_facts {
    size_t begin, end;     /* the value without the white space around it */
    size_t n_root_members; /* as written, repeated keys counted each time; 0 if no object */
    size_t n_edits;
} json_facts;

/* Optional lists of byte offsets, each as long as its count in json_facts, or NULL.
 *
 * Edits are what json-c would read wrongly: integers that do not fit an int64 (it saturates; the
 * offset is that of the byte behind them) and escaped surrogates (0.16 takes U+1D800 for another
 * half of a pair; the offset is that of the backslash, once for a pair). */
typedef struct json_marks {
    size_t *root_keys; /* the opening quotes of the root object's keys */
    size_t *edits;
} json_marks;

err_code json_check(const char *text, size_t n_bytes, const char *name, int max_depth,
                    json_facts *facts, json_marks marks, err_info *e);

/* Length of the well-formed UTF-8 sequence at p (1..4), or minus the length of the longest
 * ill-formed piece that one U+FFFD stands for (Unicode 15, section 3.9, table 3-7: overlong
 * forms, surrogates and values above U+10FFFF are ill-formed). p < end. */
int json_utf8_step(const uint8_t *p, const uint8_t *end);

/* The character that an escaped surrogate at p stands for: a pair's, or U+FFFD for half of one.
 * *n_bytes is 12 or 6. */
unsigned json_surrogate(const uint8_t *p, const uint8_t *end, int *n_bytes);

#endif
