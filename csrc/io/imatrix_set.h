/* imatrix_set: how a set of entries is kept and filled. Private to io. */
#ifndef IO_IMATRIX_SET_H
#define IO_IMATRIX_SET_H

#include <stddef.h>

#include "io/gguf.h"
#include "io/imatrix.h"

typedef struct imx_item {
    imx_entry e; /* first: an imx_entry of a set is an imx_item */
    char *name;
    float *owned[3]; /* numbers that are not borrowed from a file */
    int is_dat;
} imx_item;

struct imx_set {
    imx_item *items; /* [n], sorted by name once read */
    int64_t n, room;
    gguf_file **files; /* [n_files] what numbers are borrowed from; room for all files of a merge */
    int64_t n_files;
    char **datasets; /* [n_datasets] */
    int64_t n_datasets, room_datasets, chunk_count, chunk_size;
};

/* A new item, named, for the caller to fill; NULL without memory. */
imx_item *imx_add(imx_set *set, const char *name, size_t n_bytes, err_info *e);
void imx_item_free(imx_item *t);
err_code imx_add_dataset(imx_set *set, const char *name, size_t n_bytes, err_info *e);

/* Error texts of the next two do not name the file. */
err_code imx_sort(imx_set *set, err_info *e);
err_code imx_check(const imx_item *t, err_info *e);

/* Fill an empty set with one file's entries; their numbers are not looked at. */
err_code imx_read_gguf(imx_set *set, const char *path, err_info *e);
err_code imx_read_dat(imx_set *set, const char *path, err_info *e);

#endif
