/* st_header: the header of one safetensors file, checked against the file. Private to io. */
#ifndef IO_ST_HEADER_H
#define IO_ST_HEADER_H

#include "base/map.h"
#include "io/st.h"

enum {
    ST_HEADER_LIMIT = 100000000, /* bytes, as in the reference implementation */
    ST_NAME_LIMIT = 255,         /* bytes; keeps an error text that begins with a name readable */
};

typedef struct st_header {
    st_tensor *tensors; /* [n_tensors], in file order; name and file as described below */
    int64_t n_tensors;
    char *names;    /* what the tensors' names point into */
    char *metadata; /* key NUL value NUL ...; 2 * n_metadata strings */
    int64_t n_metadata;
} st_header;

/* Every tensor's place, shape and size is consistent with the file afterwards and its data points
 * into *m. `path` is borrowed: it begins error texts and becomes the tensors' file. All parts of *h
 * are the caller's, to free with st_header_free; on failure there is nothing to free. */
err_code st_header_read(st_header *h, const map_file *m, const char *path, err_info *e);
void st_header_free(st_header *h);

/* A name that can stand in a one-line error text: not empty, no control characters. */
int st_plain_name(const char *s);

/* Elements and bytes of a shape; 0 when a product leaves int64 or a dimension is negative. */
int st_shape_bytes(st_dtype dtype, int n_dims, const int64_t *shape, int64_t *n_bytes);

#endif
