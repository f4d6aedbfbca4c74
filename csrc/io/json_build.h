/* json_build: values out of text that json_check has passed.
 *
 * Not json-c's tokener: 0.16 takes some failed allocations for success (a NULL that reads as null,
 * members and characters left out), saturates large integers, and garbles surrogate pairs such as
 * U+1D800. Of json-c only the values are used. Private to the io room. */
#ifndef IO_JSON_BUILD_H
#define IO_JSON_BUILD_H

#include "io/json.h"
#include "io/json_check.h"

/* The value into *root (NULL is JSON null) and the first key that the root object repeats into
 * *repeated (else NULL); both the caller's, also on failure, which is always ERR_MEMORY. `facts`
 * are those of the text. apart: see json_read_file_apart, or NULL; the text then has to outlive the
 * values. */
err_code json_build(const char *text, size_t n_bytes, const json_facts *facts,
                    const char *const *apart, json_value **root, char **repeated);

#endif
