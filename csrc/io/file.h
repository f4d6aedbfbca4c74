/* file: whole small files and directories, for the side files of a checkpoint.
 *
 * Errors are ERR_IO and name the path. Thread-safe. */
#ifndef IO_FILE_H
#define IO_FILE_H

#include <limits.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* Creates a file that is to get its name later, and locks it until it is closed. What is there,
 * links too, is never touched: ERR_BUSY while another run writes it, ERR_IO if it was left or is
 * somebody's. Returns a descriptor, -1 on failure. */
int file_claim(const char *partial, err_info *e);

/* Syncs a claimed file and gives it its name; ERR_IO, and nothing is renamed, where somebody has
 * removed it since and another file has the name `partial`. fd stays open: it holds the lock. */
err_code file_settle(int fd, const char *partial, const char *path, err_info *e);

/* Closes a claimed file and removes it, if it still is what has that name. */
void file_unclaim(int fd, const char *partial);

/* Where a result of that name is written: `path` itself, or the regular file that a link there
 * leads to. ERR_IO for links to nothing, for what is no regular file and for what lies in /dev,
 * /proc or /sys (/dev/shm apart). */
err_code file_target(const char *path, char out[PATH_MAX], err_info *e);

/* Whether file_claim(target + ".partial") would find that name free; creates nothing. */
err_code file_check_free(const char *path, err_info *e);

/* Takes n_bytes of the disk for a file of that name, which may be there. */
err_code file_reserve(const char *path, int64_t n_bytes, err_info *e);

/* Replaces the target of `path`: writes beside it, fsyncs, renames. On failure the old file is
 * untouched; the new one has its permissions. */
err_code file_write(const char *path, const void *data, size_t n_bytes, err_info *e);

/* The same for what is too large to hold: a file that takes its name when it is complete. */
typedef struct file_out {
    char path[PATH_MAX], partial[PATH_MAX];
    int fd; /* -1 when closed */
} file_out;

/* On failure *out is closed, as it is after finish and abort. */
err_code file_out_open(file_out *out, const char *path, err_info *e);
err_code file_out_put(file_out *out, const void *data, size_t n_bytes, err_info *e);
/* fsync and rename; removes what was written when that fails. */
err_code file_out_finish(file_out *out, err_info *e);
void file_out_abort(file_out *out);

/* Creates one directory; one that is there already is an error. */
err_code file_make_dir(const char *path, err_info *e);

/* Makes what was created or renamed in the directory survive a power cut. */
err_code file_sync_dir(const char *path, err_info *e);

/* Calls fn for each entry but . and .., in no particular order; stops when fn returns non-zero and
 * returns ERR_CANCELLED then. is_file: a regular file, or a link to one. */
err_code file_list(const char *path, int (*fn)(void *ctx, const char *name, int is_file), void *ctx,
                   err_info *e);

/* Whether this process may create something in the directory; creates nothing. */
err_code file_check_writable(const char *path, err_info *e);

/* Bytes that this process may still write to the file system of `path`; -1 on failure. */
int64_t file_free_bytes(const char *path, err_info *e);

typedef enum file_kind { FILE_NONE, FILE_REGULAR, FILE_DIRECTORY, FILE_LINK, FILE_OTHER } file_kind;

/* What is there, without following a link. */
file_kind file_what(const char *path);

/* Size and time of the last change, in nanoseconds since 1970. */
err_code file_info(const char *path, int64_t *n_bytes, int64_t *changed_ns, err_info *e);

/* The absolute path without links, "." and ".."; an error if nothing is there. */
err_code file_real_path(const char *path, char out[PATH_MAX], err_info *e);

#endif
