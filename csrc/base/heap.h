/* heap: how malloc keeps memory. For programs that run for weeks; a library must not decide it. */
#ifndef BASE_HEAP_H
#define BASE_HEAP_H

/* Freed memory goes back to the system instead of lying about in pieces: one arena for all threads,
 * and mappings of their own for everything above HEAP_OWN_BYTES. glibc otherwise keeps an arena per
 * thread and raises that size to whatever has been freed, 32 MiB at most, and a server that sees
 * requests of all sizes grows for hours. To be called before there are threads; other C libraries
 * do as they do. */
enum { HEAP_OWN_BYTES = 256 << 10 };
void heap_keep_little(void);

/* Gives back what lies free between what is used, which takes some milliseconds for a gigabyte. */
void heap_give_back(void);

#endif
