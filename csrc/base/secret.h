/* secret: comparing what others must not learn. */
#ifndef BASE_SECRET_H
#define BASE_SECRET_H

#include <stddef.h>

/* Whether two texts are the same, in a time that depends on their lengths only: how long a wrong
 * key took must not tell how much of it was right. */
int secret_same(const void *a, size_t n_a, const void *b, size_t n_b);

#endif
