/* gguf: the GGUF container, versions 2 and 3, little-endian, memory-mapped.
 *
 * A gguf_file owns its two tables, values by key and tensors by name; what they point to is
 * borrowed from it and lives until gguf_close. Immutable after opening; any thread may read.
 * Opening reads the header only. Everything is checked against the file as ggml does it: keys and
 * names unique, tensors one behind the other at multiples of the alignment.
 * Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md */
#ifndef IO_GGUF_H
#define IO_GGUF_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* The numbers of the format. */
typedef enum gguf_kind {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
    GGUF_N_KINDS
} gguf_kind;

/* Element types of tensors that moonlet has to name; the others are numbers as well. */
enum { GGUF_TYPE_F32 = 0, GGUF_TYPE_F16 = 1, GGUF_TYPE_BF16 = 30 };

/* Of tensors; a longer name would fill an error text. */
enum { GGUF_MAX_DIMS = 4, GGUF_NAME_LIMIT = 255 };

typedef struct gguf_value {
    const char *key;
    gguf_kind kind; /* of the value, or of an array's elements; never GGUF_ARRAY */
    int is_array;
    int64_t n;           /* elements; 1 unless is_array */
    const uint8_t *data; /* the elements as in the file, at any alignment */
} gguf_value;

typedef struct gguf_tensor {
    const char *name;
    uint32_t type; /* ggml's number, one that moonlet knows the size of */
    int n_dims;
    int64_t dims[GGUF_MAX_DIMS]; /* fastest first; 1 beyond n_dims */
    int64_t n_elements, n_bytes;
    int64_t offset;      /* of data in the file */
    const uint8_t *data; /* [n_bytes], any alignment */
} gguf_tensor;

typedef struct gguf_file gguf_file;

/* NULL on failure; the text names file, value or tensor, and byte. */
gguf_file *gguf_open(const char *path, err_info *e);
void gguf_close(gguf_file *f);

/* Whether the file begins as GGUF files do; 0 also if it cannot be read. */
int gguf_is(const char *path);

int64_t gguf_n_values(const gguf_file *f);
const gguf_value *gguf_value_at(const gguf_file *f, int64_t i);   /* sorted by key */
const gguf_value *gguf_find(const gguf_file *f, const char *key); /* NULL if absent */

/* Element i, or `fallback` when v is NULL, i is outside it or it is of another sort. Integers and
 * booleans that fit an int64; floats and integers. */
int64_t gguf_int(const gguf_value *v, int64_t i, int64_t fallback);
double gguf_float(const gguf_value *v, int64_t i, double fallback);

/* Calls fn for each string of v, a string or an array of them, in order; the bytes do not end in
 * NUL. Stops when fn returns non-zero and returns that; -1 when v is NULL or of another sort. */
int gguf_each_string(const gguf_value *v, int (*fn)(void *ctx, const char *s, size_t n_bytes),
                     void *ctx);

/* Whether v is the string s. */
int gguf_is_string(const gguf_value *v, const char *s);

int64_t gguf_n_tensors(const gguf_file *f);
const gguf_tensor *gguf_tensor_at(const gguf_file *f, int64_t i);          /* sorted by name */
const gguf_tensor *gguf_find_tensor(const gguf_file *f, const char *name); /* NULL if absent */

/* ---- writing ---------------------------------------------------------------------------- */

typedef struct gguf_out_value {
    const char *key;
    gguf_kind kind; /* GGUF_U32 or GGUF_STRING */
    int is_array;
    int64_t n;        /* elements of the array; otherwise not looked at */
    const void *data; /* uint32_t[n] or const char *[n] */
} gguf_out_value;

typedef struct gguf_out_tensor { /* F32 */
    const char *name;
    int n_dims;
    int64_t dims[GGUF_MAX_DIMS];
    const float *data;
} gguf_out_tensor;

/* Replaces `path`: writes beside it, fsyncs, renames. Version 3, alignment 32, values and tensors
 * in the order given. ERR_RANGE for a tensor without usable name or shape. */
err_code gguf_write(const char *path, const gguf_out_value *values, int64_t n_values,
                    const gguf_out_tensor *tensors, int64_t n_tensors, err_info *e);

#endif
