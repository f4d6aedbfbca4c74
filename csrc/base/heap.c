#include "base/heap.h"

#include <stdlib.h> /* defines __GLIBC__ where that is the C library */

#ifdef __GLIBC__
#include <malloc.h>
#endif

void heap_keep_little(void)
{
#ifdef __GLIBC__
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_THRESHOLD, HEAP_OWN_BYTES); /* where it stays, as it was set */
    mallopt(M_TRIM_THRESHOLD, HEAP_OWN_BYTES);
#endif
}

void heap_give_back(void)
{
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}
