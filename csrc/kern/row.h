/* row: what a sampler asks of a whole row of numbers, a vocabulary long.
 *
 * Every variant gives the same bits: sums are cut as is written here, whatever the registers are.
 * The code (row_plain.h) is plain C that compilers turn into vectors of each instruction set. */
#ifndef KERN_ROW_H
#define KERN_ROW_H

#include <stdint.h>

/* Numbers that have a largest one in common, and numbers whose terms are added up together: those
 * stay in the first-level cache. */
enum { KERN_ROW_BLOCK = 64, KERN_ROW_TERMS = 256 };

/* From this distance on a term is 0, as everything below FLT_MIN is. */
#define KERN_ROW_FAR 88.0f

typedef struct kern_row_found {
    int64_t n_live; /* numbers above -inf */
    int is_bad;     /* some are NaN or +inf; what is the largest means nothing then */
} kern_row_found;

typedef struct kern_row_ops {
    /* tops[i]: the largest of x[i * KERN_ROW_BLOCK] on, of n in all. */
    kern_row_found (*scan)(const float *x, int64_t n, float *tops);

    /* Adds to *sum exp(-d) of the distances d = (top - x) * scale, in double, which are then
     * rounded to f32 and cut to 0 .. KERN_ROW_FAR; and d exp(-d) to *weighted, unless it is NULL.
     * Terms are f32. Lane j of 8 adds terms j, j + 8, ... of KERN_ROW_TERMS in double, then lanes
     * are added as a tree: j with j + 4, + 2, + 1. */
    void (*sums)(const float *x, int64_t n, double top, double scale, double *sum,
                 double *weighted);

    /* out[i] = exp(-d[i]) for KERN_ROW_TERMS numbers 0 <= d <= KERN_ROW_FAR, within 1e-7. */
    void (*terms)(const float *d, float *out);
} kern_row_ops;

#endif
