/* map: a file's bytes, mapped read-only.
 *
 * The mapping is owned by the map_file and lives until map_close; pointers into it are borrowed.
 * Any thread may read. A file that shrinks while it is mapped is not survivable (SIGBUS): sources
 * are opened read-only and moonlet itself only ever replaces files by rename. */
#ifndef BASE_MAP_H
#define BASE_MAP_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct map_file {
    const uint8_t *data; /* [n_bytes]; not NULL even when empty */
    size_t n_bytes;
} map_file;

/* Refuses what is not a regular file. On failure *m is closed. */
err_code map_open(map_file *m, const char *path, err_info *e);
void map_close(map_file *m);

/* These bytes of a mapped file will be read soon: reading them from the disk may begin. */
void map_expect(const void *data, size_t n_bytes);

/* These bytes of a mapped file will not be read again soon: the whole pages among them leave the
 * process's memory, and come back if they are read after all. */
void map_forget(const void *data, size_t n_bytes);

/* Zeroed memory that the system may put aside in a nameless file of `dir`: for arrays larger than
 * memory has to be. The disk space is reserved here. Freed with mem_pages_free(p, n_bytes). */
void *map_scratch(const char *dir, size_t n_bytes, err_info *e);

/* Memory whose content is a file's, for arrays that another process may have to go on with: what is
 * written here outlives this one. A new file replaces what is there, is zeroed, and its disk space
 * is reserved here; one that is not new has to be there with just this size. Freed with
 * mem_pages_free(p, n_bytes); the file stays. */
void *map_kept(const char *path, size_t n_bytes, int is_new, err_info *e);

/* What was written to such memory survives a power cut. */
err_code map_sync(const void *kept, size_t n_bytes, err_info *e);

#endif
