/* blas: sums of outer products by OpenBLAS, for calibration; inference never comes here.
 *
 * The library is loaded on the first blas_load and stays loaded; a `blas` is a plain value of
 * function pointers, owned by nobody and usable from any thread. OpenBLAS is held to one thread per
 * call: callers parallelise over the pool, which makes results independent of the number of
 * threads. At most BLAS_MAX_CALLS calls may run at a time.
 *
 * Which kernels OpenBLAS takes is chosen here from the instruction set, not left to its table of
 * processor models: a processor younger than the release (or hidden by a hypervisor) would get
 * kernels of a decade ago. OPENBLAS_CORETYPE in the environment wins.
 *
 * Matrices are f32, row major, `ld` floats from row to row. */
#ifndef KERN_BLAS_H
#define KERN_BLAS_H

#include <stdint.h>

#include "base/err.h"

/* OpenBLAS has work buffers for 64 threads; beyond that old releases end the process. */
enum { BLAS_MAX_CALLS = 32 };

/* The numbers of CBLAS. */
typedef enum blas_order { BLAS_ROW_MAJOR = 101 } blas_order;
typedef enum blas_trans { BLAS_PLAIN = 111, BLAS_TRANSPOSED = 112 } blas_trans;
typedef enum blas_uplo { BLAS_UPPER = 121 } blas_uplo;

typedef struct blas {
    /* C = alpha op(A) op(B) + beta C; op(A) [m][k], op(B) [k][n], C [m][n] */
    void (*sgemm)(blas_order, blas_trans a, blas_trans b, int m, int n, int k, float alpha,
                  const float *A, int lda, const float *B, int ldb, float beta, float *C, int ldc);
    /* One triangle of C [n][n] = alpha A A^T + beta C, A [n][k] (BLAS_PLAIN), or alpha A^T A, A
     * [k][n] (BLAS_TRANSPOSED) */
    void (*ssyrk)(blas_order, blas_uplo, blas_trans, int n, int k, float alpha, const float *A,
                  int lda, float beta, float *C, int ldc);
    const char *core; /* OpenBLAS's name of the kernels in use */
} blas;

/* ERR_UNSUPPORTED naming the Debian package if there is no OpenBLAS. */
err_code blas_load(blas *b, err_info *e);

/* H += X^T X for several X at once, upper triangles only. The sums are cut into tiles by shape
 * alone, so they do not depend on the pool. */
typedef struct blas_gram_job {
    const float *x; /* [n][cols] */
    int64_t n, cols;
    float *h; /* [cols][cols], of no other job */
} blas_gram_job;

struct pool;
void blas_gram(const blas *b, struct pool *p, const blas_gram_job *jobs, int64_t n_jobs);

/* The lower triangle of A [n][n] from the upper one. */
void blas_mirror(struct pool *p, float *A, int64_t n);

#endif
