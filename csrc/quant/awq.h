/* awq: scales for the columns of matrices, and what undoes them before.
 *
 * Columns whose inputs are large matter more, and a group's scale follows its largest weights: a
 * column multiplied by s > 1 is rounded more finely at the cost of its neighbours. What makes the
 * inputs is divided by s, so that nothing changes but rounding (AWQ, Lin et al. 2023,
 * arXiv:2306.00978). Here is the arithmetic on vectors; which matrices share inputs, and which
 * strength is best, is moonlet.awq's to decide. Pure: no allocation, any thread. */
#ifndef QUANT_AWQ_H
#define QUANT_AWQ_H

#include <stdint.h>

#include "num/matrix.h"

/* A vector seen as [outer][repeat][inner], where all repeats must share a scale: heads that read
 * the same values, or the same norm weight. */
typedef struct awq_span {
    int64_t outer, repeat, inner;
} awq_span;

/* Which inputs count as how loud: mean squares below share * (mean over all), and below least, are
 * taken as that. */
typedef struct awq_floor {
    float share, least;
} awq_floor;

/* s[outer][inner] = gain * rms^alpha / sqrt(max rms^alpha * min rms^alpha), where rms is the root
 * of the mean squares in importance[outer][repeat][inner], averaged over the repeats. Finite and
 * positive, whatever the importance. */
void awq_scales(const float *importance, awq_span span, float alpha, float gain, awq_floor quiet,
                float *s);

/* s[outer][inner] for every repeat, into out[outer][repeat][inner]. */
void awq_spread(const float *s, awq_span span, float *out);

/* What errors count in columns that are scaled by s[n] (NULL: not scaled), into out[n]: the mean
 * squares of their inputs, times `share`, tempered: importance^power * mean^(1 - power). */
void awq_weights(const float *importance, const float *s, int64_t n, float share, float power,
                 float *out);

/* A norm weight norm[n] (as it multiplies) is to be divided by s[n]. It is written as
 * norm * norm_scale - subtract, rounded to `dtype`, and read back by adding `subtract`; what
 * readers of the normalized vector must be multiplied by to undo exactly that goes into
 * col_scale[n]. So its rounding costs nothing. A channel that rounding would lose keeps its
 * weight. */
void awq_fold_norm(const float *norm, const float *s, int64_t n, num_dtype dtype, float subtract,
                   float *norm_scale, float *col_scale);

#endif
