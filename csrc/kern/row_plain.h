/* What row.h defines, once for each instruction set. */
#ifndef KERN_ROW_PLAIN_H
#define KERN_ROW_PLAIN_H

#include <math.h>

#include "kern/kern_const.h"
#include "kern/row.h"

/* kern_expf(-d) without fused multiply-adds, which only some instruction sets have: 2^n times a
 * polynomial in r, where -d = n ln 2 + r. */
static inline float term(float d)
{
    float shifted = EXP_ROUND - d * EXP_LOG2E, n = shifted - EXP_ROUND;
    float r = -d - n * EXP_LN2_HI - n * EXP_LN2_LO, p = EXP_C5;
    p = p * r + EXP_C4;
    p = p * r + EXP_C3;
    p = p * r + EXP_C2;
    p = p * r + EXP_C1;
    p = p * r + EXP_C0;
    p = p * r * r + r + 1.0f;
    union {
        float number;
        uint32_t bits;
    } power = {.number = shifted};
    power.bits = (power.bits + 127) << 23;
    return p * power.number;
}

static void terms(const float *d, float *out)
{
    for (int i = 0; i < KERN_ROW_TERMS; i++) out[i] = term(d[i]);
}

static inline float within_reach(float d)
{
    d = d > 0.0f ? d : 0.0f;
    return d < KERN_ROW_FAR ? d : KERN_ROW_FAR;
}

/* Without a scale a difference of floats in double, rounded, is their difference in f32. */
static inline void distances(const float *x, int64_t n, double top, double scale, float *d)
{
    float near = (float)top;
    if (scale == 1 && near == top)
        for (int64_t i = 0; i < n; i++) d[i] = within_reach(near - x[i]);
    else
        for (int64_t i = 0; i < n; i++) d[i] = within_reach((float)((top - (double)x[i]) * scale));
    for (int64_t i = n; i < KERN_ROW_TERMS; i++) d[i] = KERN_ROW_FAR;
}

/* One sum alone would wait for each addition. */
static inline double add_up(const float *t)
{
    double lane[8] = {0};
    for (int i = 0; i < KERN_ROW_TERMS; i += 8)
        for (int j = 0; j < 8; j++) lane[j] += t[i + j];
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

static inline void sum_piece(const float *x, int64_t n, double top, double scale, double *sum,
                             double *weighted)
{
    float d[KERN_ROW_TERMS], t[KERN_ROW_TERMS];
    distances(x, n, top, scale, d);
    terms(d, t);
    *sum += add_up(t);
    if (!weighted) return;
    for (int i = 0; i < KERN_ROW_TERMS; i++) d[i] *= t[i];
    *weighted += add_up(d);
}

static void sums(const float *x, int64_t n, double top, double scale, double *sum, double *weighted)
{
    int64_t i = 0;
    for (; i + KERN_ROW_TERMS <= n; i += KERN_ROW_TERMS)
        sum_piece(x + i, KERN_ROW_TERMS, top, scale, sum, weighted);
    if (i < n) sum_piece(x + i, n - i, top, scale, sum, weighted);
}

#define LARGER(a, b) ((a) > (b) ? (a) : (b))

/* So many blocks at once that finding the largest of 16 lanes is a loop over blocks. */
enum { SCAN_BLOCKS = 16, SCAN_LANES = 16, SCAN = SCAN_BLOCKS * KERN_ROW_BLOCK };

static inline void tops_of_blocks(const float *x, float *tops)
{
    float lane[SCAN_BLOCKS][SCAN_LANES];
    for (int b = 0; b < SCAN_BLOCKS; b++, x += KERN_ROW_BLOCK)
        for (int j = 0; j < SCAN_LANES; j++) {
            float low = LARGER(x[j], x[j + SCAN_LANES]);
            float high = LARGER(x[j + 2 * SCAN_LANES], x[j + 3 * SCAN_LANES]);
            lane[b][j] = LARGER(low, high);
        }
    for (int b = 0; b < SCAN_BLOCKS; b++) {
        float top = lane[b][0];
        for (int j = 1; j < SCAN_LANES; j++) top = LARGER(lane[b][j], top);
        tops[b] = top;
    }
}

/* n is small: counters of 32 bits are as wide as the numbers. */
static inline void count(const float *x, int64_t n, kern_row_found *found)
{
    int bad = 0, live = 0;
    for (int64_t i = 0; i < n; i++) {
        bad |= !(x[i] < INFINITY);
        live += x[i] > -INFINITY;
    }
    found->is_bad |= bad;
    found->n_live += live;
}

static kern_row_found scan(const float *x, int64_t n, float *tops)
{
    _Static_assert(KERN_ROW_BLOCK == 4 * SCAN_LANES, "lanes of a block");
    kern_row_found found = {0};
    int64_t i = 0;
    for (; i + SCAN <= n; i += SCAN) {
        count(x + i, SCAN, &found);
        tops_of_blocks(x + i, tops + i / KERN_ROW_BLOCK);
    }
    count(x + i, n - i, &found);
    for (; i < n; i += KERN_ROW_BLOCK) {
        float top = x[i];
        for (int64_t k = i + 1; k < n && k < i + KERN_ROW_BLOCK; k++) top = LARGER(x[k], top);
        tops[i / KERN_ROW_BLOCK] = top;
    }
    return found;
}

#undef LARGER

#define KERN_ROW_OPS                                                                               \
    {                                                                                              \
        .scan = scan, .sums = sums, .terms = terms                                                 \
    }

#endif
