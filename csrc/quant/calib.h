/* calib: what the inputs of a model's matrices look like over a text.
 *
 * Numbers belong to sites (model/tap.h): matrices that read the same rows share them. A site is
 * named by the layer and what reads it:
 *
 *   layers.N.mixer_in      q_proj k_proj v_proj, or in_proj_qkv in_proj_z in_proj_b in_proj_a
 *   layers.N.mixer_out     o_proj, or out_proj
 *   layers.N.ffn_in        gate_proj up_proj, dense or shared expert's; router, shared_expert_gate
 *   layers.N.ffn_down      down_proj, dense or shared expert's
 *   layers.N.experts_in    the experts' gate_proj up_proj
 *   layers.N.experts_down  the experts' down_proj
 *   head_in                lm_head
 *
 * Sums are kept in f64 in the order of the text, so results do not depend on the number of threads.
 * Hessians (sums of x x^T) are f32, of one layer at a time, and go to a safetensors file as each
 * layer ends. There are none of experts_in, which would be E H^2 numbers per layer: the experts'
 * gate and up take ffn_in's, whose rows are all that any of them may see. Where there are too many
 * inputs for a whole Hessian, they are cut into equal blocks, as few as will do, each a multiple of
 * CALIB_BLOCK inputs, so that a group of any format lies in one; what inputs of different blocks
 * have to do with each other is not known then.
 *
 * What a layer leaves for those behind it (the residual stream, sums, Hessians) can be kept in
 * files, for a process that goes on where this one was cut off.
 *
 * Driven by one thread; borrows the model. */
#ifndef QUANT_CALIB_H
#define QUANT_CALIB_H

#include "model/layers.h"

typedef struct calib calib;

typedef struct calib_options {
    const char *dir;         /* for what another process goes on with; NULL keeps it in memory */
    int64_t n_layers;        /* that a process before this one kept in `dir`, 0 to begin */
    int kept;                /* and what its last calib_keep said */
    const char *hessians;    /* file to write; NULL for none */
    int is_written;          /* it is complete already: n_layers is all of them */
    int64_t hessian_cols;    /* largest Hessian; sites with more inputs get a row of blocks */
    const char *const *meta; /* of that file: key, value, ..., NULL */
} calib_options;

enum { CALIB_NAME_BYTES = 48, CALIB_BLOCK = 128 };

typedef struct calib_site {
    char name[CALIB_NAME_BYTES];
    int64_t cols, n_mat; /* inputs of n_mat matrices: experts, 1 elsewhere */
    int64_t side;        /* inputs of a Hessian: cols, or of each block of its diagonal; 0: none */
    float *sums, *sums2; /* [n_mat][cols] of x and of x^2; zero until the layer is done */
    int64_t *counts;     /* [n_mat] rows that each matrix met */
} calib_site;

/* Sequences as layers_open. ERR_UNSUPPORTED without OpenBLAS when Hessians are wanted; disk space
 * for them is reserved here. */
calib *calib_open(model *m, const int32_t *ids, const int64_t *first, int64_t n_sequences,
                  const calib_options *options, err_info *e);
/* What was not finished leaves no file, unless there is a `dir`: then all stays as it is. */
void calib_close(calib *c);

/* One sequence through one layer; as layers_step. ERR_RANGE names a site whose inputs are not
 * finite. After an error only closing is left: further steps say the same. */
err_code calib_step(calib *c, const cancel_flag *cancel, err_info *e);
int64_t calib_n_steps(const calib *c);
int64_t calib_n_done(const calib *c);
int64_t calib_n_layers(const calib *c); /* done; the head is one more */

/* Between layers: what is done so far is on the disk. calib_n_layers and *kept are what a
 * calib_open that goes on with it has to be told. */
err_code calib_keep(calib *c, int *kept, err_info *e);

/* When all steps are done: the file of Hessians to its place. Tensors "<site>" [n_mat][cols][cols],
 * without the first dimension where n_mat is 1, or [n][side][side] for the blocks of n_mat 1, and
 * "<site>.counts" [n_mat] or [n] int64. */
err_code calib_finish(calib *c, err_info *e);

int64_t calib_n_sites(const calib *c);
const calib_site *calib_site_at(const calib *c, int64_t i); /* in the order of the forward pass */

#endif
