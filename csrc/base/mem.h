/* mem: allocation with overflow checks and cache-line alignment.
 *
 * Everything returned is owned by the caller and freed with mem_free (NULL is fine). */
#ifndef BASE_MEM_H
#define BASE_MEM_H

#include <stddef.h>

#include "base/err.h"

/* n * size bytes, zeroed, 64-byte aligned. NULL with ERR_MEMORY when it does not fit.
 * n == 0 gives a valid pointer. */
void *mem_array(size_t n, size_t size, err_info *e);

/* Zeroed anonymous pages that cost memory only once touched; for KV rows and other large arrays
 * of which only a prefix is used. Freed with mem_pages_free(p, n_bytes). */
void *mem_pages(size_t n_bytes, err_info *e);
/* Likewise, in large pages where the system has them: for what is read again and again from end to
 * end, at a cost of up to 2 MiB behind what is touched. */
void *mem_large_pages(size_t n_bytes, err_info *e);
void mem_pages_free(void *p, size_t n_bytes);

/* A copy of n bytes with a NUL behind them. */
char *mem_copy(const char *s, size_t n, err_info *e);

void mem_free(void *p);

#endif
