/* st: safetensors files and checkpoint directories, memory-mapped.
 *
 * An st_set is a directory (or one file): the tensors of all its files in one sorted table.
 * Everything is borrowed from the set until st_close. Immutable after opening; any thread may read.
 * Opening reads headers only. Format: https://github.com/huggingface/safetensors (8-byte
 * little-endian header length, JSON header, data); offsets are checked against shape, dtype and
 * file size, gaps and overlaps are refused as the reference implementation does. */
#ifndef IO_ST_H
#define IO_ST_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef enum st_dtype {
    ST_BOOL,
    ST_U8,
    ST_I8,
    ST_F8_E4M3,
    ST_F8_E5M2,
    ST_F8_E8M0,
    ST_U16,
    ST_I16,
    ST_F16,
    ST_BF16,
    ST_U32,
    ST_I32,
    ST_F32,
    ST_U64,
    ST_I64,
    ST_F64,
    ST_N_DTYPES
} st_dtype;

enum { ST_MAX_DIMS = 8 };

typedef struct st_tensor {
    const char *name;
    const char *file; /* path, for error texts */
    st_dtype dtype;
    int n_dims;
    int64_t shape[ST_MAX_DIMS];
    const uint8_t *data; /* [n_bytes], any alignment */
    int64_t n_bytes;
    int64_t offset; /* of data in the file */
} st_tensor;

typedef struct st_set st_set;

/* `path`: a .safetensors file, or a directory.
 *
 * A directory with model.safetensors.index.json: the index is authoritative. Every tensor it lists
 * must be in the shard it names and in no other listed shard; other tensors of those shards do not
 * count. model*.safetensors files that it does not name are not opened; other files beside them
 * (mtp.safetensors, vision.safetensors) are, and add the tensors that the index does not list.
 * A directory without one: all its .safetensors files. A name in two files is an error. */
st_set *st_open(const char *path, err_info *e);
void st_close(st_set *set);

int64_t st_count(const st_set *set);
const st_tensor *st_at(const st_set *set, int64_t i);          /* sorted by name */
const st_tensor *st_find(const st_set *set, const char *name); /* NULL if absent */
/* From __metadata__ of the first file by name, of those in the index if there is one; NULL if
 * absent. */
const char *st_metadata(const st_set *set, const char *key);

const char *st_dtype_name(st_dtype dtype); /* "BF16" */
int st_dtype_bytes(st_dtype dtype);
/* -1 if the name is unknown */
int st_dtype_parse(const char *name);
int64_t st_elements(const st_tensor *t);

/* ---- writing ---------------------------------------------------------------------------- */

typedef struct st_entry {
    const char *name;
    st_dtype dtype;
    int n_dims;
    int64_t shape[ST_MAX_DIMS];
} st_entry;

typedef struct st_writer st_writer;

/* One file, written to `path` + ".partial" (which must be free: see file_claim) and renamed by
 * st_writer_finish after fsync; the header is padded so that data starts at a multiple of 64.
 * Tensors are laid out in the order given, with no gaps: ERR_RANGE for a name that is empty,
 * repeated or has control characters. Disk space is reserved first, so a full disk is reported
 * before any work. Copies what it needs. */
st_writer *st_writer_open(const char *path, const st_entry *entries, int64_t n_entries,
                          const char *const *metadata /* key, value, ..., NULL */, err_info *e);
/* Goes on with the partial file that a writer told to keep it, or a process that died, left: its
 * first n_done tensors are complete, the others are put again. ERR_FORMAT if it was begun for
 * other tensors. Keeps the file, which stays as it is if it cannot be gone on with. */
st_writer *st_writer_resume(const char *path, const st_entry *entries, int64_t n_entries,
                            const char *const *metadata, int64_t n_done, err_info *e);
/* Bytes of tensor i, from byte `at` on; any order, any thread, each byte once. */
err_code st_writer_put(st_writer *w, int64_t i, int64_t at, const void *data, int64_t n_bytes,
                       err_info *e);
/* From now on the partial file stays until it is finished, whatever fails. */
void st_writer_keep(st_writer *w);
/* ERR_RANGE when bytes of a tensor were not put. Frees w, also on failure, which leaves neither
 * the partial file (unless it is kept) nor a changed `path`. */
err_code st_writer_finish(st_writer *w, err_info *e);
/* What was put so far survives a power cut. */
err_code st_writer_sync(st_writer *w, err_info *e);
/* Frees w and removes the partial file, unless it is kept. */
void st_writer_abort(st_writer *w);

#endif
