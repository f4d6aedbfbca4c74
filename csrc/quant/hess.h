/* hess: what error feedback has to know of a matrix's inputs, in the form in which it is used.
 *
 * For inputs x the error E = W - W' of a matrix costs tr(E H E^T), H = sum x x^T. With H = R R^T, R
 * upper triangular, a row e costs
 *     sum_k d_k (e_k + sum_{j<k} f_kj e_j)^2,    d_k = R_kk^2,  f_kj = R_jk / R_kk,
 * so that columns taken one after the other each want the code nearest to w_k + sum_{j<k} f_kj e_j.
 * That is GPTQ (Frantar et al. 2022), which writes the same sums with a factor of the inverse of H;
 * the form without an inverse is LDLQ (Chee et al., QuIP, 2023, which proves them equal) and is one
 * Cholesky factorization, from the last column to the first.
 *
 * Columns are taken by falling H_kk ("activation order"), which leaves the columns that matter most
 * the most columns to make up for them.
 *
 * Few inputs say little about which columns go together, so the diagonal is raised by a share of
 * its mean that falls with their number: 1/100 + n / (10 inputs). The constants gave the least
 * error on other text for experts of the demo model at 3 bits, from n/16 to 16 n inputs.
 *
 * All sums are kern_ops.dots: a factor has the same bits on every machine, whatever the number of
 * threads. */
#ifndef QUANT_HESS_H
#define QUANT_HESS_H

#include "base/err.h"
#include "base/pool.h"
#include "kern/kern.h"

typedef struct hess { /* the steps k are columns in activation order */
    int64_t n;
    float *matrix;   /* [n][n] H by column, regularized */
    int32_t *order;  /* [n] the column of step k */
    float *feedback; /* [n][n] f_kj for j < k, 1 for j = k, 0 for j > k */
    float *cost;     /* [n] d_k */
    float damping;   /* what was added to the diagonal, as a share of its mean */
} hess;

/* All borrowed. Columns that were multiplied by col_scale have inputs divided by it. */
typedef struct hess_inputs {
    const uint8_t *sum;     /* [n][n] f32 at any alignment: sum of x x^T */
    double count;           /* inputs in it */
    const float *col_scale; /* [n] or NULL */
} hess_inputs;

/* Room for matrices of n columns, a multiple of 8: 2 n n floats. On failure *h may be freed. */
err_code hess_alloc(hess *h, int64_t n, err_info *e);
void hess_free(hess *h);

typedef enum hess_state {
    HESS_READY,
    HESS_UNSEEN, /* no inputs: nothing to go by */
    HESS_LOST,   /* no damping leaves a factor: zeros alone, too few inputs, too badly summed */
    HESS_BROKEN, /* numbers that no inputs give: below 0 or nothing but rounding on the diagonal,
                    other than on the other side of it, or not finite */
} hess_state;

/* Factors into h. Where f32 cannot hold the factor the share is raised tenfold, to at most 10.
 * p may be NULL: the calling thread does everything. */
hess_state hess_factor(hess *h, const hess_inputs *in, const kern_ops *ops, pool *p);

#endif
