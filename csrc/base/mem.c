#include "base/mem.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

void *mem_array(size_t n, size_t size, err_info *e)
{
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes) || bytes > SIZE_MAX - 64) {
        err_set(e, ERR_MEMORY, "cannot allocate %zu x %zu bytes", n, size);
        return NULL;
    }
    bytes = (bytes + 64) & ~(size_t)63;
    void *p = aligned_alloc(64, bytes);
    if (!p) {
        err_set(e, ERR_MEMORY, "cannot allocate %zu bytes", bytes);
        return NULL;
    }
    return memset(p, 0, bytes);
}

void *mem_pages(size_t n_bytes, err_info *e)
{
    void *p = mmap(NULL, n_bytes ? n_bytes : 1, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        err_set(e, ERR_MEMORY, "cannot map %zu bytes", n_bytes);
        return NULL;
    }
    return p;
}

void *mem_large_pages(size_t n_bytes, err_info *e)
{
    void *p = mem_pages(n_bytes, e);
    if (p) madvise(p, n_bytes, MADV_HUGEPAGE); /* where the kernel has none, small pages do */
    return p;
}

void mem_pages_free(void *p, size_t n_bytes)
{
    if (p) munmap(p, n_bytes ? n_bytes : 1);
}

char *mem_copy(const char *s, size_t n, err_info *e)
{
    char *p = mem_array(n + 1, 1, e);
    if (p) memcpy(p, s, n);
    return p;
}

void mem_free(void *p)
{
    free(p);
}
