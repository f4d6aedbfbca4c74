/* buf: bytes, code points or ids that grow. Owned by whoever holds the struct; zero it before use,
 * buf_free it after. */
#ifndef TEXT_BUF_H
#define TEXT_BUF_H

#include <stddef.h>

#include "base/err.h"

typedef struct buf {
    void *data; /* [cap] bytes, of which the caller says how many count */
    size_t n;   /* bytes in use */
    size_t cap;
} buf;

/* Room for `more` further bytes behind the n in use. What is there moves along. */
err_code buf_reserve(buf *b, size_t more, err_info *e);
err_code buf_append(buf *b, const void *bytes, size_t n, err_info *e);
void buf_free(buf *b);

#endif
