/* Least squared error for affine groups.
 *
 * 16 grids are tried at once, one per lane: each end of the range where it is, or moved by a few
 * steps (inwards it clips, and all other codes are finer). In turns every weight takes the nearest
 * code, and the grid the scale and bias that are best for these codes, which never makes it worse
 * (Lloyd's algorithm): one turn tells the grids apart, two where weights count unequally or codes
 * are few; the best one goes on alone. Grids around it that can be stored and MLX's own are
 * compared as a decoder sees them. Errors are those of a search over 16 x 16 ends to within two
 * percent.
 *
 * A file to be included: by num/fit_plain.c and, under the flags of an instruction set, by kern.
 * Nothing is contracted or reordered, so its bits do not depend on how wide vectors are. */
#ifndef NUM_FIT_AFFINE_H
#define NUM_FIT_AFFINE_H

#include "num/group.h"

enum { LANES = NUM_FIT_LANES, STORED = 8 /* grids that are compared */, MINMAX = STORED - 1 };

#define EACH NUM_FIT_EACH

/* Adding it and taking it away rounds to a whole number, ties to even. */
#define ROUND 0x1.8p23f

/* Some lanes as one value, which compilers keep in a register through a loop;
 * arrays they would not. Lanes do not meet, so that results do not depend on
 * how many there are. */
#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
typedef float some __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t some_mask __attribute__((vector_size(WIDTH * sizeof(float))));

#define SOME          for (int first = 0; first < LANES; first += WIDTH)
#define PICK(m, a, b) ((some)(((some_mask)(a) & (m)) | ((some_mask)(b) & ~(m))))
#define LOAD(v, from) memcpy(&(v), from, sizeof(v))
#define STORE(to, v)  memcpy(to, &(v), sizeof(v))

typedef struct grids { /* scale * q + bias, q = 0 .. top */
    float scale[LANES], bias[LANES];
} grids;

/* w as x = (w - mean) * gain, so that no square overflows or vanishes and sums
 * do not cancel. */
typedef struct search {
    const num_format *f;
    float w[NUM_MAX_GROUP], x[NUM_MAX_GROUP], h[NUM_MAX_GROUP];
    float top;    /* the largest code */
    float lo, hi; /* range of the x that matter */
    float mean, gain;
    float sum_h, sum_x, sum_xx; /* of h, h x, h x^2 */
} search;

/* Of the codes q that a grid gives to x, as u = q - origin, with the origin
 * where x is 0. */
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

/* Weights that do not matter may be far out: they are put where another one is.
 */
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

/* With zero points w = 0 is always within; symmetric ones have as much on
 * either side. */
static void include_zero(search *s)
{
    float zero = -(s->mean * s->gain);
    float below = s->lo < zero ? zero - s->lo : 0, above = s->hi > zero ? s->hi - zero : 0;
    if (s->f->zero_point == NUM_ZP_SYMMETRIC) below = above = below > above ? below : above;
    s->lo = zero - below;
    s->hi = zero + above;
}

/* Returns 0 when there is nothing to search: all weights that matter are the
 * same, or too small for their squares. */
static int prepare(search *s)
{
    float sum_h[LANES], sum_w[LANES], sum_x[LANES], sum_xx[LANES];
    int64_t n = s->f->group;
    num_range(s->w, n, &s->lo, &s->hi);
    float half = s->hi * 0.5f - s->lo * 0.5f;
    if (!(half > 0x1p-120f)) return 0;
    SOME
    {
        some w, h, all_h = {0}, all_w = {0};
        for (int64_t i = first; i < n; i += LANES) {
            LOAD(w, s->w + i);
            LOAD(h, s->h + i);
            all_h += h;
            all_w += h * (w * 0x1p-7f); /* 128 of them do not overflow */
        }
        STORE(sum_h + first, all_h);
        STORE(sum_w + first, all_w);
    }
    s->sum_h = lane_sum(sum_h);
    s->mean = lane_sum(sum_w) / s->sum_h * 0x1p7f;
    s->gain = 1.0f / half;
    SOME
    {
        some w, h, all_x = {0}, all_xx = {0};
        for (int64_t i = first; i < n; i += LANES) {
            LOAD(w, s->w + i);
            LOAD(h, s->h + i);
            some x = (w - s->mean) * s->gain, hx = h * x;
            STORE(s->x + i, x);
            all_x += hx;
            all_xx += hx * x;
        }
        STORE(sum_x + first, all_x);
        STORE(sum_xx + first, all_xx);
    }
    s->sum_x = lane_sum(sum_x);
    s->sum_xx = lane_sum(sum_xx);
    s->lo = (s->lo - s->mean) * s->gain;
    s->hi = (s->hi - s->mean) * s->gain;
    if (s->f->zero_point) include_zero(s);
    return 1;
}

/* Brings t within the codes. */
#define CLAMP(t, top)                                                                              \
    do {                                                                                           \
        t = PICK(t > 0, t, none);                                                                  \
        t = PICK(t < top, t, top);                                                                 \
    } while (0)

static void sum_codes(const search *s, const grids *g, code_sums *out)
{
    const some none = {0}, top = none + s->top;
    SOME
    {
        some scale, bias, u = {0}, uu = {0}, ux = {0};
        LOAD(scale, g->scale + first);
        LOAD(bias, g->bias + first);
        some inverse = 1.0f / scale, offset = -bias * inverse;
        some origin = offset;
        CLAMP(origin, top);
        origin += ROUND;
        for (int64_t i = 0; i < s->f->group; i++) {
            some t = s->x[i] * inverse + offset;
            CLAMP(t, top);
            t = t + ROUND - origin;
            some ht = s->h[i] * t;
            u += ht;
            uu += ht * t;
            ux += ht * s->x[i];
        }
        origin = origin - ROUND;
        STORE(out->origin + first, origin);
        STORE(out->u + first, u);
        STORE(out->uu + first, uu);
        STORE(out->ux + first, ux);
    }
}

/* The same for the one grid that all lanes hold: a lane takes every 16th
 * weight. */
static void sum_codes_of_one(const search *s, const grids *g, code_sums *out)
{
    float u[LANES], uu[LANES], ux[LANES];
    float inverse = 1.0f / g->scale[0], offset = -g->bias[0] * inverse;
    float origin = clamp(offset, s->top) + ROUND;
    const some none = {0}, top = none + s->top;
    SOME
    {
        some x, h, all_u = {0}, all_uu = {0}, all_ux = {0};
        for (int64_t i = first; i < s->f->group; i += LANES) {
            LOAD(x, s->x + i);
            LOAD(h, s->h + i);
            some t = x * inverse + offset;
            CLAMP(t, top);
            t = t + ROUND - origin;
            some ht = h * t;
            all_u += ht;
            all_uu += ht * t;
            all_ux += ht * x;
        }
        STORE(u + first, all_u);
        STORE(uu + first, all_uu);
        STORE(ux + first, all_ux);
    }
    float sum_u = lane_sum(u), sum_uu = lane_sum(uu), sum_ux = lane_sum(ux);
    EACH
    {
        out->origin[j] = origin - ROUND;
        out->u[j] = sum_u;
        out->uu[j] = sum_uu;
        out->ux[j] = sum_ux;
    }
}

/* sum of h ((w - decoded) gain)^2 for a grid as it is stored */
static float stored_error(const search *s, float scale, float bias)
{
    float sums[LANES], inverse = 1.0f / scale;
    const some none = {0}, top = none + s->top;
    SOME
    {
        some w, h, sum = {0};
        for (int64_t i = first; i < s->f->group; i += LANES) {
            LOAD(w, s->w + i);
            LOAD(h, s->h + i);
            some q = (w - bias) * inverse;
            CLAMP(q, top);
            q = q + ROUND - ROUND;
            some product = scale * q, d = (w - (product + bias)) * s->gain;
            sum += h * (d * d);
        }
        STORE(sums + first, sum);
    }
    return lane_sum(sums);
}

/* How far the ends move, in steps. Where weights count unequally those at the
 * ends may not be worth their codes. */
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

/* The zero point of a grid, -bias / scale + plus rounded down; all of x here,
 * where w = 0 is at -mean gain. */
static float zero_of(const search *s, float scale, float bias, float plus)
{
    if (s->f->zero_point == NUM_ZP_SYMMETRIC) return (s->top + 1) * 0.5f;
    float zero = floorf(-(bias + s->mean * s->gain) / scale + plus);
    zero = zero > 0 ? zero : 0;
    return zero < s->top ? zero : s->top;
}

/* The best scale when zero is the code nearest to it: regression through that
 * point. */
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

/* One turn, with the codes that were summed: the least squares for them.
 * residual: what is left, infinite where the codes did not allow another grid.
 */
static void refit(const search *s, const code_sums *codes, grids *g, float *residual)
{
    code_sums sums = *codes;
    float scale[LANES], bias[LANES], left[LANES], sound[LANES];
    float sum_h = s->sum_h, sum_x = s->sum_x, sum_xx = s->sum_xx;
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

static int least(const float *x, int n)
{
    int best = n - 1;
    float value = x[best];
    for (int j = 0; j < n - 1; j++) {
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

/* Scales around one of x, as stored, each with the bias that keeps the mean
 * where it is. */
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

/* In all lanes. */
static void keep_one(grids *g, int lane)
{
    float scale = g->scale[lane], bias = g->bias[lane];
    EACH g->scale[j] = scale;
    EACH g->bias[j] = bias;
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
    code_sums sums;
    for (int turn = weighted || f->bits <= 2 ? 2 : 1; turn > 0; turn--) {
        sum_codes(&s, &x, &sums);
        refit(&s, &sums, &x, residual);
    }
    keep_one(&x, least(residual, LANES));
    for (int turn = 2; turn > 0; turn--) {
        sum_codes_of_one(&s, &x, &sums);
        refit(&s, &sums, &x, residual);
    }
    if (f->zero_point)
        stored_zero_points(&s, x.scale[0], x.bias[0], &stored);
    else
        stored_grids(&s, x.scale[0], x.bias[0], &stored);
    stored.scale[MINMAX] = g->scale;
    stored.bias[MINMAX] = g->bias;
    for (int j = 0; j < STORED; j++) error[j] = stored_error(&s, stored.scale[j], stored.bias[j]);
    int best = least(error, STORED);
    if (!(error[best] < error[MINMAX] * NUM_FIT_BETTER) || stored.scale[best] == 0) return;
    g->scale = stored.scale[best];
    g->bias = stored.bias[best];
    if (f->zero_point)
        num_zero_point_group(g->scale, rintf(-g->bias / g->scale), g);
    else
        num_group_settle(f, g);
}

#undef CLAMP
#undef STORE
#undef LOAD
#undef PICK
#undef SOME
#undef ROUND
#undef EACH
#endif
