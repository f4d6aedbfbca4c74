#include "quant/gptq.h"

#include <math.h>
#include <string.h>

/* Steps whose errors reach each other one by one; those of steps before come by `dots`. */
enum { BLOCK = 64 };

/* Offsets of the arrays of one call in its scratch. */
typedef struct room {
    int64_t errors, targets, within, column, vectors, groups, codes, total;
} room;

static int64_t take(room *r, int64_t n, int64_t size)
{
    int64_t at = r->total;
    r->total += (n * size + 63) / 64 * 64;
    return at;
}

static room room_for(const num_format *f, int64_t n)
{
    room r = {0};
    r.errors = take(&r, GPTQ_ROWS * n, sizeof(float));
    r.targets = take(&r, GPTQ_ROWS * BLOCK, sizeof(float));
    r.within = take(&r, BLOCK * BLOCK, sizeof(float));
    r.column = take(&r, n, sizeof(float));
    r.vectors = take(&r, 3 * GPTQ_ROWS * f->group, sizeof(float));
    r.groups = take(&r, GPTQ_ROWS * (n / f->group), sizeof(num_group));
    r.codes = take(&r, GPTQ_ROWS * n, 1);
    return r;
}

int64_t gptq_scratch_bytes(const num_format *f, int64_t n)
{
    return room_for(f, n).total;
}

/* One call. Errors and targets stand in activation order, codes and groups as stored. */
typedef struct tile {
    const gptq_job *job;
    const float *rows; /* [n_rows][n] */
    int64_t n, n_rows, n_groups;
    float *errors;     /* [n_rows][n] */
    float *targets;    /* [n_rows][BLOCK] */
    float *within;     /* [BLOCK][BLOCK] feedback of step j on step k of one block at [j][k] */
    float *column;     /* [n] costs by column, a decoded row, or errors by column */
    float *vectors;    /* 3 times [n_rows][group]: gradients, changes and their products */
    num_group *groups; /* [n_rows][n_groups] */
    uint8_t *codes;    /* [n_rows][n] */
    double spent[GPTQ_ROWS], plain[GPTQ_ROWS];
} tile;

static int64_t at_most(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ---- scales --------------------------------------------------------------------------------- */

/* What errors cost by column; NULL when all cost the same: then the weights alone decide, as they
 * do in a plain fit. */
static const float *column_costs(tile *t)
{
    const hess *h = t->job->h;
    int same = 1;
    for (int64_t k = 0; k < t->n; k++) {
        t->column[h->order[k]] = h->cost[k];
        same &= h->cost[k] == h->cost[0];
    }
    return same ? NULL : t->column;
}

static void fit_groups(tile *t)
{
    const num_format *f = t->job->format;
    const float *cost = column_costs(t);
    for (int64_t r = 0; r < t->n_rows; r++)
        for (int64_t g = 0; g < t->n_groups; g++)
            num_group_fit(f, t->job->fit, t->job->ops->fit, t->rows + r * t->n + g * f->group,
                          cost ? cost + g * f->group : NULL, t->groups + r * t->n_groups + g);
    for (int64_t i = 0; i < t->n_rows * t->n_groups; i++) num_group_settle(f, &t->groups[i]);
}

/* ---- codes ---------------------------------------------------------------------------------- */

/* out[r][k - first] = what the errors before step `first` leave to steps first .. first + count. */
static void earlier(const tile *t, int64_t first, int64_t count)
{
    const float *feedback = t->job->h->feedback + first * t->n;
    for (int64_t k = 0; k < count; k += KERN_ROWS)
        t->job->ops->dots(feedback + k * t->n, t->n, KERN_ROWS, t->errors, t->n, t->n_rows, first,
                          t->targets + k, BLOCK);
}

static void code_row(tile *t, int64_t r, int64_t first, int64_t count)
{
    const gptq_job *job = t->job;
    const hess *h = job->h;
    const float *w = t->rows + r * t->n;
    float *target = t->targets + r * BLOCK, *error = t->errors + r * t->n + first;
    for (int64_t k = 0; k < count; k++) target[k] += w[h->order[first + k]];
    for (int64_t k = 0; k < count; k++) {
        int64_t column = h->order[first + k];
        const num_group *g = t->groups + r * t->n_groups + column / job->format->group;
        if (!isfinite(target[k])) t->spent[r] = INFINITY; /* only where weights are near FLT_MAX */
        uint8_t code = num_group_code(job->format, g, isfinite(target[k]) ? target[k] : 0.0f);
        float value = num_group_value(job->format, g, code), missed = target[k] - value;
        t->codes[r * t->n + column] = code;
        t->spent[r] += (double)h->cost[first + k] * missed * missed;
        error[k] = w[column] - value;
        job->ops->axpy(error[k], t->within + k * BLOCK + k + 1, target + k + 1, count - k - 1);
    }
}

static void code_rows(tile *t)
{
    const hess *h = t->job->h;
    for (int64_t first = 0; first < t->n; first += BLOCK) {
        int64_t count = at_most(BLOCK, t->n - first);
        earlier(t, first, count);
        for (int64_t k = 0; k < count; k++)
            for (int64_t j = 0; j < k; j++)
                t->within[j * BLOCK + k] = h->feedback[(first + k) * t->n + first + j];
        for (int64_t r = 0; r < t->n_rows; r++) code_row(t, r, first, count);
    }
}

/* ---- polish --------------------------------------------------------------------------------- */

/* Once every column has its code, all errors are known, those of later columns too. One more pass
 * over the groups: scale and bias are refitted to their codes, which is a linear problem of two
 * unknowns, then each column takes the code that is best while all others stay. Every change lowers
 * the cost; together they are worth 4 to 10 percent of it, at 4 to 2 bits. */

static float round_to(num_dtype dtype, float x)
{
    uint8_t bytes[4];
    num_elements_encode(&x, 1, dtype, bytes);
    return num_element(bytes, dtype, 0);
}

/* out[r][k] = row k of H's block of group g, [size][n] at `block`, times x[r]. */
static void times_block(const tile *t, const float *block, int64_t size, const float *x,
                        int64_t ldx, int64_t cols, float *out)
{
    for (int64_t k = 0; k < size; k += KERN_ROWS)
        t->job->ops->dots(block + k * t->n, t->n, KERN_ROWS, x, ldx, t->n_rows, cols, out + k,
                          t->job->format->group);
}

typedef struct sums { /* of products with H's block of one group; c: codes, 1: ones */
    double cHc, cH1, oneH1, c_gradient, gradient;
} sums;

static sums add_up(int64_t size, double oneH1, const float *codes, const float *product,
                   const float *gradient)
{
    sums s = {.oneH1 = oneH1};
    for (int64_t k = 0; k < size; k++) {
        s.cHc += (double)codes[k] * product[k];
        s.cH1 += product[k];
        s.c_gradient += (double)codes[k] * gradient[k];
        s.gradient += gradient[k];
    }
    return s;
}

/* Least squares: the change of scale and bias after which codes and ones are orthogonal to the
 * gradient. 0 when there is none that the format can hold. */
static int refit(const num_format *f, const sums *s, num_group *g)
{
    double det = s->cHc * s->oneH1 - s->cH1 * s->cH1;
    if (!(det > 1e-9 * s->cHc * s->oneH1)) return 0;
    double scale = (s->oneH1 * s->c_gradient - s->cH1 * s->gradient) / det;
    double bias = (s->cHc * s->gradient - s->cH1 * s->c_gradient) / det;
    g->scale = round_to(f->scale_dtype, g->scale + (float)scale);
    g->bias = round_to(f->scale_dtype, g->bias + (float)bias);
    num_group_settle(f, g);
    return isfinite(g->scale) && isfinite(g->bias) && g->scale != 0;
}

/* Scales and biases of group g in all rows as their codes would have them, into fitted, and how
 * errors would change by that. */
static void fit_to_codes(tile *t, int64_t g, const float *block, num_group *fitted, float *change)
{
    const num_format *f = t->job->format;
    int64_t size = f->group;
    const float *gradient = t->vectors;
    float *product = change + GPTQ_ROWS * size;
    double oneH1 = 0;
    for (int64_t i = 0; i < size; i++)
        for (int64_t j = 0; j < size; j++) oneH1 += block[i * t->n + j];
    for (int64_t r = 0; r < t->n_rows; r++)
        for (int64_t k = 0; k < size; k++) change[r * size + k] = t->codes[r * t->n + g * size + k];
    times_block(t, block, size, change, size, size, product);
    for (int64_t r = 0; r < t->n_rows; r++) {
        int64_t at = r * t->n + g * size;
        float *x = change + r * size;
        sums s = add_up(size, oneH1, x, product + r * size, gradient + r * size);
        fitted[r] = t->groups[r * t->n_groups + g];
        int ok = refit(f, &s, &fitted[r]);
        for (int64_t k = 0; k < size; k++) {
            float value = num_group_value(f, &fitted[r], t->codes[at + k]);
            x[k] = ok ? t->rows[at + k] - value - t->errors[at + k] : 0;
        }
    }
}

/* The gradients, E H of the group's columns, and errors are kept up to date. */
static void refit_groups(tile *t, int64_t g, const float *block)
{
    int64_t size = t->job->format->group;
    float *change = t->vectors + GPTQ_ROWS * size, *product = change + GPTQ_ROWS * size;
    num_group fitted[GPTQ_ROWS];
    fit_to_codes(t, g, block, fitted, change);
    times_block(t, block, size, change, size, size, product);
    for (int64_t r = 0; r < t->n_rows; r++) {
        double gain = 0;
        const float *x = change + r * size, *y = product + r * size;
        float *gradient = t->vectors + r * size, *error = t->errors + r * t->n + g * size;
        for (int64_t k = 0; k < size; k++) gain += (double)x[k] * (2 * (double)gradient[k] + y[k]);
        if (!(gain < 0)) continue;
        t->spent[r] += gain;
        t->groups[r * t->n_groups + g] = fitted[r];
        for (int64_t k = 0; k < size; k++) {
            error[k] += x[k];
            gradient[k] += y[k];
        }
    }
}

static void recode(tile *t, int64_t r, int64_t g, const float *block, float *gradient)
{
    const num_format *f = t->job->format;
    const num_group *group = t->groups + r * t->n_groups + g;
    uint8_t *codes = t->codes + r * t->n + g * f->group;
    float *error = t->errors + r * t->n + g * f->group;
    for (int64_t k = 0; k < f->group; k++) {
        float price = block[k * t->n + k], value = num_group_value(f, group, codes[k]);
        float wanted = value + gradient[k] / price;
        if (!isfinite(wanted)) continue;
        uint8_t code = num_group_code(f, group, wanted);
        if (code == codes[k]) continue;
        float change = value - num_group_value(f, group, code);
        double gain = (double)change * (2 * (double)gradient[k] + (double)price * change);
        if (!(gain < 0)) continue;
        t->spent[r] += gain;
        codes[k] = code;
        error[k] += change;
        t->job->ops->axpy(change, block + k * t->n, gradient, f->group);
    }
}

static void polish(tile *t)
{
    const num_format *f = t->job->format;
    float *gradient = t->vectors;
    for (int64_t r = 0; r < t->n_rows; r++)
        for (int64_t k = 0; k < t->n; k++)
            t->errors[r * t->n + k] = t->rows[r * t->n + k] -
                                      num_group_value(f, t->groups + r * t->n_groups + k / f->group,
                                                      t->codes[r * t->n + k]);
    for (int64_t g = 0; g < t->n_groups; g++) {
        const float *rows = t->job->h->matrix + g * f->group * t->n;
        times_block(t, rows, f->group, t->errors, t->n, t->n, gradient);
        if (f->mode == NUM_AFFINE && !f->zero_point) refit_groups(t, g, rows + g * f->group);
        for (int64_t r = 0; r < t->n_rows; r++)
            recode(t, r, g, rows + g * f->group, gradient + r * f->group);
    }
}

/* ---- the plain fit -------------------------------------------------------------------------- */

/* One row of the three arrays. */
typedef struct output {
    uint8_t *codes, *scales, *biases;
} output;

static output output_row(const num_format *f, int64_t n, output first, int64_t row)
{
    return (output){first.codes + row * num_format_code_bytes(f, n),
                    first.scales + row * num_format_scale_bytes(f, n),
                    first.biases + row * num_format_bias_bytes(f, n)};
}

/* -1, or the first weight that has no code. */
static int64_t fit_plainly(const tile *t, output out)
{
    const gptq_job *job = t->job;
    for (int64_t r = 0; r < t->n_rows; r++) {
        output o = output_row(job->format, t->n, out, r);
        int64_t bad = num_fit_row(job->format, job->fit, job->ops->fit, t->rows + r * t->n,
                                  job->importance, t->n, o.codes, o.scales, o.biases);
        if (bad >= 0) return r * t->n + bad;
    }
    return -1;
}

static void plain_errors(tile *t, output out)
{
    num_matrix m =
        num_format_matrix(t->job->format, t->n_rows, t->n, out.codes, out.scales, out.biases);
    const int32_t *order = t->job->h->order;
    for (int64_t r = 0; r < t->n_rows; r++) {
        const float *w = t->rows + r * t->n;
        float *error = t->errors + r * t->n;
        t->job->ops->decode[m.mode](&m, r, t->column);
        for (int64_t k = 0; k < t->n; k++) error[k] = w[order[k]] - t->column[order[k]];
    }
}

/* Adds up t->plain, until every row's is more than it spent with feedback. */
static void price_plain_fit(tile *t)
{
    const hess *h = t->job->h;
    memset(t->plain, 0, sizeof t->plain);
    for (int64_t first = 0; first < t->n; first += KERN_ROWS) {
        int dearer = 1;
        t->job->ops->dots(h->feedback + first * t->n, t->n, KERN_ROWS, t->errors, t->n, t->n_rows,
                          first + KERN_ROWS, t->targets, BLOCK);
        for (int64_t r = 0; r < t->n_rows; r++) {
            for (int k = 0; k < KERN_ROWS; k++) {
                float missed = t->targets[r * BLOCK + k];
                t->plain[r] += (double)h->cost[first + k] * missed * missed;
            }
            dearer &= t->plain[r] > t->spent[r];
        }
        if (dearer) return;
    }
}

int64_t gptq_encode(const gptq_job *job, const float *rows, int64_t n_rows, uint8_t *codes,
                    uint8_t *scales, uint8_t *biases, void *scratch)
{
    const num_format *f = job->format;
    int64_t n = job->h->n;
    room at = room_for(f, n);
    uint8_t *base = scratch;
    tile t = {.job = job,
              .rows = rows,
              .n = n,
              .n_rows = n_rows,
              .n_groups = n / f->group,
              .errors = (float *)(void *)(base + at.errors),
              .targets = (float *)(void *)(base + at.targets),
              .within = (float *)(void *)(base + at.within),
              .column = (float *)(void *)(base + at.column),
              .vectors = (float *)(void *)(base + at.vectors),
              .groups = (num_group *)(void *)(base + at.groups),
              .codes = base + at.codes};
    output out = {codes, scales, biases};
    int64_t bad = fit_plainly(&t, out);
    if (bad >= 0) return bad;
    fit_groups(&t);
    code_rows(&t);
    polish(&t);
    plain_errors(&t, out);
    price_plain_fit(&t);
    for (int64_t r = 0; r < n_rows; r++) {
        output o = output_row(f, n, out, r);
        if (!(t.spent[r] < t.plain[r])) continue;
        num_row_pack(f, t.groups + r * t.n_groups, t.codes + r * n, n, o.codes, o.scales, o.biases);
    }
    return -1;
}
