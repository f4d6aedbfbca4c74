/* imatrix: what the inputs of every matrix look like over calibration text, in llama.cpp's files.
 *
 * GGUF (general.type "imatrix"; <weight>.in_sum2, .counts and sometimes .in_sum) and the older
 * .dat are read, GGUF is written. Names are those of the file ("blk.0.ffn_down_exps.weight"): what
 * they are in a checkpoint of ours is moonlet.imatrix's to know. Source of both formats: llama.cpp
 * tools/imatrix/imatrix.cpp.
 *
 * A set owns its entries or borrows their numbers from the mapped file; immutable, any thread. */
#ifndef IO_IMATRIX_H
#define IO_IMATRIX_H

#include <stdint.h>

#include "base/err.h"

/* n_in inputs of n_mat matrices (experts; 1 elsewhere), matrix by matrix. The .dat form does not
 * say how n_values divides. Sums run over the tokens that met the matrix. */
typedef struct imx_entry {
    const char *name;
    int64_t n_in;        /* 0 when the file does not say */
    int64_t n_values;    /* n_in * n_mat */
    int64_t n_counts;    /* n_mat, or 1: the same for all */
    const float *sums2;  /* [n_values] sums of x^2: finite, not negative */
    const float *sums;   /* [n_values] sums of x: finite; or NULL */
    const float *counts; /* [n_counts] tokens: finite; 0 or at least 1 */
} imx_entry;

typedef struct imx_set imx_set;

/* One file, or several added up: a count of one element then holds for all matrices, and sums of x
 * are kept only if every file with the entry has them. ERR_FORMAT for entries that do not fit each
 * other. NULL on failure. */
imx_set *imx_open(const char *const *paths, int64_t n_paths, err_info *e);
void imx_close(imx_set *set);

int64_t imx_count(const imx_set *set);
const imx_entry *imx_at(const imx_set *set, int64_t i);          /* sorted by name */
const imx_entry *imx_find(const imx_set *set, const char *name); /* NULL if absent */

/* What the files say about their making; 0 and none when they do not. Chunk counts add up. */
int64_t imx_n_datasets(const imx_set *set);
const char *imx_dataset(const imx_set *set, int64_t i);
int64_t imx_chunk_count(const imx_set *set);
int64_t imx_chunk_size(const imx_set *set); /* of the first file */

/* Whether an entry can be that of n_mat matrices with n_in inputs. */
int imx_fits(const imx_entry *t, int64_t n_in, int64_t n_mat);

/* Tokens that matrix `mat` of n_mat met; the entry must fit. (.dat files say 1 for every input of
 * an expert that met none.) */
double imx_tokens(const imx_entry *t, int64_t n_mat, int64_t mat);

/* Mean squares of the inputs of matrix `mat` of n_mat into out[n_values / n_mat]; the entry must
 * fit. A matrix that met no token gets the mean over the tokens of all its neighbours, and so does
 * mat = -1. Returns the number of tokens the mean is of, 0 if the matrix met none itself, -1 if
 * its neighbours did not either (out is zero then). */
double imx_mean_squares(const imx_entry *t, int64_t n_mat, int64_t mat, float *out);

/* Blocks of `dim` floats, one per value head of a Gated DeltaNet. GGUF tiles value heads over key
 * heads (head r * key_heads + k), Hugging Face groups them by key head (k * per_key + r); into
 * out[key_heads * per_key * dim] from one order to the other. */
void imx_order_heads(const float *x, int64_t key_heads, int64_t per_key, int64_t dim, int to_file,
                     float *out);

/* ---- writing ---------------------------------------------------------------------------- */

typedef struct imx_meta {
    const char *const *datasets; /* [n_datasets] names of the texts */
    int64_t n_datasets;
    uint32_t chunk_count, chunk_size; /* chunk_size in tokens */
} imx_meta;

/* Replaces `path` by a GGUF with these entries, sorted by name; n_in and n_counts (= n_mat) as
 * above. ERR_RANGE names an entry that is impossible or given twice, or has a number that imx_open
 * would refuse. */
err_code imx_write(const char *path, const imx_entry *entries, int64_t n_entries,
                   const imx_meta *meta, err_info *e);

#endif
