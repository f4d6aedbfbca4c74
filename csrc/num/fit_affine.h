/* Least squared error for affine groups.
 *
 * 16 grids are tried at once, one per lane: each end of the range where it is, or moved by a few
 * steps (inwards it clips, and all other codes are finer). In turns every weight takes the nearest
 * code, and the grid the scale and bias that are best for these codes, which never makes it worse
 * (Lloyd's algorithm). 15 grids around the best one that can be stored and MLX's own are compared
 * as a decoder sees them. Errors are those of a search over 16 x 16 ends to within a percent.
 *
 * A file to be included: by num/fit_plain.c and, under the flags of an instruction set, by kern.
 * Compilers make vector code of the loops over lanes; as nothing is contracted or reordered, its
 * bits do not depend on how. */
#ifndef NUM_FIT_AFFINE_H
#define NUM_FIT_AFFINE_H

#include "num/group.h"

enum { LANES = NUM_FIT_LANES, MINMAX = LANES - 1 };

#define EACH NUM_FIT_EACH

/* Adding it and taking it away rounds to a whole number, ties to even. */
#define ROUND 0x1.8p23f

typedef struct grids { /* scale * q + bias, q = 0 .. top */
    float scale[LANES], bias[LANES];
} grids;

/* w as x = (w - mean) * gain, so that no square overflows or vanishes and sums do not cancel. */
typedef struct search {
    const num_format *f;
    float w[NUM_MAX_GROUP], x[NUM_MAX_GROUP], h[NUM_MAX_GROUP];
    float top;    /* the largest code */
    float lo, hi; /* range of the x that matter */
    float mean, gain;
    float sum_h, sum_x, sum_xx; /* of h, h x, h x^2 */
} search;

/* Of the codes q that a grid gives to x, as u = q - origin, with the origin where x is 0. */
typedef struct code_sums {
    float origin[LANES];
    float u[LANES], uu[LANES], ux[LANES]; /* of h u, h u^2, h u x */
} code_sums;

static inline float clamp(float t, float top)
{
    t = t > 0.0f ? t : 0.0f;
    return t < top ? t : top;
}

static float lane_sum(const float *lanes)
{
    float sum[LANES / 2];
    for (int j = 0; j < LANES / 2; j++) sum[j] = lanes[j] + lanes[j + LANES / 2];
    return (sum[0] + sum[4]) + (sum[1] + sum[5]) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

/* Weights that do not matter may be far out: they are put where another one is. */
static void copy_weights(search *s, const float *w)
{
    int64_t n = s->f->group, one = 0;
    while (!(s->h[one] > 0)) one++;
    float inside = w[one];
    for (int64_t i = 0; i < n; i++) {
        float a = w[i]; /* loads and selects apart, so that the loop is vectorized */
        s->w[i] = s->h[i] > 0 ? a : inside;
    }
}

/* With zero points w = 0 is always within; symmetric ones have as much on either side. */
static void include_zero(search *s)
{
    float zero = -(s->mean * s->gain);
    float below = s->lo < zero ? zero - s->lo : 0, above = s->hi > zero ? s->hi - zero : 0;
    if (s->f->zero_point == NUM_ZP_SYMMETRIC) below = above = below > above ? below : above;
    s->lo = zero - below;
    s->hi = zero + above;
}

/* Returns 0 when there is nothing to search: all weights that matter are the same, or too small
 * for their squares. */
static int prepare(search *s)
{
    float sum_h[LANES], sum_w[LANES], sum_x[LANES], sum_xx[LANES];
    int64_t n = s->f->group;
    num_range(s->w, n, &s->lo, &s->hi);
    float half = s->hi * 0.5f - s->lo * 0.5f;
    if (!(half > 0x1p-120f)) return 0;
    EACH
    {
        float all_h = 0, all_w = 0;
        for (int64_t i = j; i < n; i += LANES) {
            all_h += s->h[i];
            all_w += s->h[i] * (s->w[i] * 0x1p-7f); /* 128 of them do not overflow */
        }
        sum_h[j] = all_h;
        sum_w[j] = all_w;
    }
    s->sum_h = lane_sum(sum_h);
    s->mean = lane_sum(sum_w) / s->sum_h * 0x1p7f;
    s->gain = 1.0f / half;
    float mean = s->mean, gain = s->gain;
    for (int64_t i = 0; i < n; i++) s->x[i] = (s->w[i] - mean) * gain;
    EACH
    {
        float all_x = 0, all_xx = 0;
        for (int64_t i = j; i < n; i += LANES) {
            float hx = s->h[i] * s->x[i];
            all_x += hx;
            all_xx += hx * s->x[i];
        }
        sum_x[j] = all_x;
        sum_xx[j] = all_xx;
    }
    s->sum_x = lane_sum(sum_x);
    s->sum_xx = lane_sum(sum_xx);
    s->lo = (s->lo - s->mean) * s->gain;
    s->hi = (s->hi - s->mean) * s->gain;
    if (s->f->zero_point) include_zero(s);
    return 1;
}

static void sum_codes(const search *s, const grids *g, code_sums *out)
{
    code_sums sums = {0};
    float inverse[LANES], offset[LANES], origin[LANES], top = s->top;
    EACH
    {
        inverse[j] = 1.0f / g->scale[j];
        offset[j] = -g->bias[j] * inverse[j];
        origin[j] = clamp(offset[j], top) + ROUND;
        sums.origin[j] = origin[j] - ROUND;
    }
    for (int64_t i = 0; i < s->f->group; i++) {
        float x = s->x[i], h = s->h[i];
        EACH
        {
            float u = clamp(x * inverse[j] + offset[j], top) + ROUND - origin[j];
            float hu = h * u;
            sums.u[j] += hu;
            sums.uu[j] += hu * u;
            sums.ux[j] += hu * x;
        }
    }
    *out = sums;
}

/* error = sum of h ((w - decoded) gain)^2 for grids as they are stored. */
static void sum_errors(const search *s, const grids *g, float *error)
{
    float inverse[LANES], sum[LANES] = {0}, top = s->top, gain = s->gain;
    grids stored = *g;
    EACH inverse[j] = 1.0f / stored.scale[j];
    for (int64_t i = 0; i < s->f->group; i++) {
        float w = s->w[i], h = s->h[i];
        EACH
        {
            float q = clamp((w - stored.bias[j]) * inverse[j], top) + ROUND - ROUND;
            float product = stored.scale[j] * q;
            float d = (w - (product + stored.bias[j])) * gain;
            sum[j] += h * (d * d);
        }
    }
    memcpy(error, sum, sizeof sum);
}

/* How far the ends move, in steps. Where weights count unequally those at the ends may not be worth
 * their codes. */
static void first_grids(const search *s, int weighted, grids *g)
{
    float top = s->top, step = (s->hi - s->lo) / top, from = weighted ? -1.75f : -1.0f, to = 0.5f;
    if (from < -0.4f * top) from = -0.4f * top; /* at most four fifths of the range */
    float lo[LANES], hi[LANES];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            lo[4 * i + j] = s->lo - step * (from + (to - from) / 3.0f * (float)i);
            hi[4 * i + j] = s->hi + step * (from + (to - from) / 3.0f * (float)j);
        }
    EACH g->scale[j] = (hi[j] - lo[j]) / top;
    EACH g->bias[j] = lo[j];
}

/* The zero point of a grid, -bias / scale + plus rounded down; all of x here, where w = 0 is at
 * -mean gain. */
static float zero_of(const search *s, float scale, float bias, float plus)
{
    if (s->f->zero_point == NUM_ZP_SYMMETRIC) return (s->top + 1) * 0.5f;
    float zero = floorf(-(bias + s->mean * s->gain) / scale + plus);
    zero = zero > 0 ? zero : 0;
    return zero < s->top ? zero : s->top;
}

/* The best scale when zero is the code nearest to it: regression through that point. */
static void refit_through_zero(const search *s, const code_sums *sums, grids *g, float *residual)
{
    float m = s->mean * s->gain, sum_ww = s->sum_xx + m * (2 * s->sum_x + m * s->sum_h);
    EACH
    {
        float zero = zero_of(s, g->scale[j], g->bias[j], 0.5f), a = sums->origin[j] - zero;
        float uu = sums->uu[j] + a * (2 * sums->u[j] + a * s->sum_h);
        float ux = sums->ux[j] + m * sums->u[j] + a * (s->sum_x + m * s->sum_h);
        float scale = ux / uu;
        int sound = (uu > 0) & (scale > 1e-6f * g->scale[j]);
        g->scale[j] = sound ? scale : g->scale[j];
        g->bias[j] = -(g->scale[j] * zero) - m;
        residual[j] = sound ? sum_ww - scale * ux : INFINITY;
    }
}

/* One turn: codes, then the least squares for them. residual: what is left, infinite where the
 * codes did not allow another grid. */
static void refit(const search *s, grids *g, float *residual)
{
    code_sums sums;
    float scale[LANES], bias[LANES], left[LANES], sound[LANES];
    float sum_h = s->sum_h, sum_x = s->sum_x, sum_xx = s->sum_xx;
    sum_codes(s, g, &sums);
    EACH
    {
        float spread = sum_h * sums.uu[j] - sums.u[j] * sums.u[j];
        scale[j] = (sum_h * sums.ux[j] - sums.u[j] * sum_x) / spread;
        float middle = (sum_x - scale[j] * sums.u[j]) / sum_h;
        bias[j] = middle - scale[j] * sums.origin[j];
        left[j] = sum_xx - middle * sum_x - scale[j] * sums.ux[j];
        sound[j] = spread - 1e-6f * sum_h * sums.uu[j];
    }
    EACH left[j] = sound[j] > 0 ? left[j] : INFINITY;
    EACH left[j] = scale[j] > 1e-6f * g->scale[j] ? left[j] : INFINITY;
    EACH g->scale[j] = left[j] < INFINITY ? scale[j] : g->scale[j];
    EACH g->bias[j] = left[j] < INFINITY ? bias[j] : g->bias[j];
    memcpy(residual, left, sizeof left);
    if (s->f->zero_point) refit_through_zero(s, &sums, g, residual);
}

static int least(const float *x)
{
    int best = MINMAX; /* its error is a number */
    float value = x[best];
    for (int j = 0; j < MINMAX; j++) {
        int better = x[j] < value;
        value = better ? x[j] : value;
        best = better ? j : best;
    }
    return best;
}

/* As num_rounded, of finite numbers. */
static void round_lanes(float *x, num_dtype dtype)
{
    if (dtype == NUM_DT_BF16) {
        EACH
        {
            uint32_t u = fp_bits(x[j]);
            x[j] = fp_from_bits((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u);
        }
    } else {
        EACH x[j] = num_rounded(x[j], dtype);
    }
}

/* Scales around one of x, as stored, each with the bias that keeps the mean where it is. */
static void stored_grids(const search *s, float scale, float bias, grids *g)
{
    float end = bias + scale * s->top, m = s->mean * s->gain;
    if (fabsf(end + m) < fabsf(bias + m)) { /* the smaller end is stored more exactly */
        bias = end;
        scale = -scale;
    }
    float mean = s->sum_x / s->sum_h, code = (mean - bias) / scale, unit = 1.0f / s->gain;
    EACH g->scale[j] = scale * (1.0f + (float)(j - MINMAX / 2) * 0x1p-8f) * unit;
    round_lanes(g->scale, s->f->scale_dtype);
    EACH g->bias[j] = mean * unit + s->mean - g->scale[j] * code;
    round_lanes(g->bias, s->f->scale_dtype);
}

/* Likewise with zero points: the two next to the best, in turn. */
static void stored_zero_points(const search *s, float scale, float bias, grids *g)
{
    float unit = 1.0f / s->gain;
    EACH g->scale[j] = scale * (1.0f + (float)(j / 2 - MINMAX / 4) * 0x1p-7f) * unit;
    round_lanes(g->scale, s->f->scale_dtype);
    EACH g->bias[j] = -(g->scale[j] * zero_of(s, scale, bias, (float)(j % 2)));
}

static void affine_mse(const num_format *f, const float *w, const float *importance, num_group *g)
{
    search s;
    s.f = f;
    s.top = (float)((1 << f->bits) - 1);
    grids x, stored;
    float residual[LANES], error[LANES];
    num_affine_minmax(f, w, g);
    num_group_settle(f, g);
    int weighted = num_importance(importance, f->group, s.h);
    copy_weights(&s, w);
    if (!prepare(&s)) return;
    first_grids(&s, weighted, &x);
    for (int turn = f->bits <= 3 ? 4 : 2; turn > 0; turn--) refit(&s, &x, residual);
    int best = least(residual);
    if (f->zero_point)
        stored_zero_points(&s, x.scale[best], x.bias[best], &stored);
    else
        stored_grids(&s, x.scale[best], x.bias[best], &stored);
    stored.scale[MINMAX] = g->scale;
    stored.bias[MINMAX] = g->bias;
    sum_errors(&s, &stored, error);
    best = least(error);
    if (!(error[best] < error[MINMAX] * NUM_FIT_BETTER) || stored.scale[best] == 0) return;
    g->scale = stored.scale[best];
    g->bias = stored.bias[best];
    if (f->zero_point)
        num_zero_point_group(g->scale, rintf(-g->bias / g->scale), g);
    else
        num_group_settle(f, g);
}

#undef ROUND
#undef EACH
#endif
