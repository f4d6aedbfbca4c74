/* hash: SHA-256 as 64 hexadecimal digits, to tell whether two files are the same.
 *
 * Pure but for reading; any thread. */
#ifndef IO_HASH_H
#define IO_HASH_H

#include <stddef.h>

#include "base/cancel.h"
#include "base/err.h"

enum { HASH_TEXT = 65 };

void hash_bytes(const void *data, size_t n_bytes, char out[HASH_TEXT]);

/* Of a whole regular file. `cancel` is looked at every few megabytes. */
err_code hash_file(const char *path, const cancel_flag *cancel, char out[HASH_TEXT], err_info *e);

#endif
