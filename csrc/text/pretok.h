/* pretok: cuts text into the pieces that are merged separately, by the file's own pattern.
 *
 * The pattern is written for Oniguruma and run by PCRE2. What the two read differently is either
 * rewritten (\s, \S: exactly Unicode White_Space; PCRE2's also takes U+180E) or refused by name. */
#ifndef TEXT_PRETOK_H
#define TEXT_PRETOK_H

#include <stddef.h>

#include "base/err.h"

typedef struct pretok pretok; /* immutable, may be shared by threads */

/* `pattern` is valid UTF-8. NULL on failure. */
pretok *pretok_open(const char *pattern, size_t n, err_info *e);
void pretok_close(pretok *p);

/* The state of matching: one for each thread. NULL on failure. */
typedef struct pretok_work pretok_work;
pretok_work *pretok_work_open(const pretok *p, err_info *e);
void pretok_work_close(pretok_work *w);

/* Calls fn with each piece of the valid UTF-8 text[n], in order: matches, and what lies between
 * them. Stops at the first error that fn returns. Pieces are never empty. */
typedef err_code (*pretok_fn)(void *ctx, const char *piece, size_t n, err_info *e);
err_code pretok_split(const pretok *p, pretok_work *w, const char *text, size_t n, pretok_fn fn,
                      void *ctx, err_info *e);

#endif
