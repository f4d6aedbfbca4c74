/* calib: sums over the rows that a tap shows, layer by layer. */
#include "quant/calib.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/map.h"
#include "base/mem.h"
#include "kern/blas.h"

/* A site while its layer runs. */
typedef struct running {
    double *sums, *sums2; /* [n_mat][cols] */
    float *h;             /* [n_hessians][side][side] upper triangles; NULL if none is wanted */
    float *rows;          /* [n_hessians][room][side] rows that are not in h yet */
    int64_t *n_rows;      /* [n_hessians] */
    int64_t room;
} running;

struct calib {
    model *m;
    layers *run;
    tap tap;
    calib_site *sites; /* [n_sites] of each layer, then the head's */
    int64_t n_sites, per_layer;
    uint8_t *sums; /* [sum_bytes] what the sites' pointers point into: pages, or a file's */
    size_t sum_bytes;
    int is_kept;              /* in files that stay */
    running now[TAP_N_SITES]; /* of layer `layer` */
    int64_t layer;            /* -1 before the first and after the last */
    blas b;
    blas_gram_job *jobs; /* [most Hessians of a site] */
    st_writer *out;      /* of Hessians; NULL if none are wanted */
    int64_t n_entries;   /* put so far */
    err_info failure;    /* of the step that ended it; ERR_NONE until then */
};

/* ---- sites ---------------------------------------------------------------------------------- */

static const char *const site_names[TAP_N_SITES] = {
    "mixer_in", "mixer_out", "ffn_in", "ffn_down", "experts_in", "experts_down", "head_in"};

/* The sites of a layer in the order of their numbers; layer n_layers has the head's alone. */
static int first_site(const calib *c, int64_t layer)
{
    return layer < c->m->config.n_layers ? 0 : TAP_HEAD;
}

static int64_t count_sites(const calib *c, int64_t layer)
{
    return layer < c->m->config.n_layers ? c->per_layer : 1;
}

static calib_site *site_at(const calib *c, int64_t layer, int site)
{
    return &c->sites[layer * c->per_layer + site - first_site(c, layer)];
}

static int64_t site_cols(const model_config *c, int64_t layer, int site)
{
    switch ((tap_site)site) {
    case TAP_MIXER_OUT:
        return c->is_full[layer] ? (int64_t)c->n_heads * c->head_dim : config_value_width(c);
    case TAP_FFN_DOWN: return c->is_moe ? c->shared_intermediate_size : c->intermediate_size;
    case TAP_EXPERT_DOWN: return c->moe_intermediate_size;
    default: return c->hidden_size;
    }
}

static int is_experts(int site)
{
    return site == TAP_EXPERT_IN || site == TAP_EXPERT_DOWN;
}

/* Inputs of each Hessian of a site, or 0. Stacks of experts have no blocks: theirs would have to be
 * told apart from the experts. */
static int64_t hessian_side(const calib_site *s, int64_t most)
{
    if (s->cols <= most) return s->cols;
    for (int64_t n = 2; s->n_mat == 1 && n <= s->cols / CALIB_BLOCK; n++)
        if (s->cols % (n * CALIB_BLOCK) == 0 && s->cols / n <= most) return s->cols / n;
    return 0;
}

static int64_t n_blocks(const calib_site *s)
{
    return s->side ? s->cols / s->side : 0;
}

static int64_t n_hessians(const calib_site *s)
{
    return s->n_mat * n_blocks(s);
}

static void name_site(calib *c, int64_t layer, int site, const calib_options *o)
{
    const model_config *config = &c->m->config;
    calib_site *s = site_at(c, layer, site);
    s->cols = site_cols(config, layer, site);
    s->n_mat = is_experts(site) ? config->n_experts : 1;
    s->side = o->hessians && site != TAP_EXPERT_IN ? hessian_side(s, o->hessian_cols) : 0;
    if (site == TAP_HEAD)
        snprintf(s->name, sizeof s->name, "%s", site_names[site]);
    else
        snprintf(s->name, sizeof s->name, "layers.%d.%s", (int)layer, site_names[site]);
}

/* A site's counts, sums and sums of squares, one after the other. */
static size_t site_bytes(const calib_site *s)
{
    return (size_t)s->n_mat * (sizeof *s->counts + 2 * (size_t)s->cols * sizeof *s->sums);
}

/* A file in the directory of what is kept, or no name where nothing is. */
static err_code kept_path(const calib_options *o, const char *name, char out[PATH_MAX], err_info *e)
{
    int n = snprintf(out, PATH_MAX, "%s/%s", o->dir ? o->dir : "", name);
    return n >= 0 && n < PATH_MAX ? ERR_NONE
                                  : err_set(e, ERR_LIMIT, "%.100s...: path too long", o->dir);
}

/* Those of layers that are still to come are zeroed. */
static err_code open_sums(calib *c, const calib_options *o, err_info *e)
{
    char path[PATH_MAX];
    for (int64_t i = 0; i < c->n_sites; i++) c->sum_bytes += site_bytes(&c->sites[i]);
    if (kept_path(o, "sums", path, e)) return e->code;
    c->sums = o->dir ? map_kept(path, c->sum_bytes, !o->n_layers, e) : mem_pages(c->sum_bytes, e);
    if (!c->sums) return e->code;
    uint8_t *at = c->sums;
    for (int64_t i = 0; i < c->n_sites; i++) {
        calib_site *s = &c->sites[i];
        s->counts = (int64_t *)(void *)at;
        s->sums = (float *)(void *)(s->counts + s->n_mat);
        s->sums2 = s->sums + s->n_mat * s->cols;
        if (o->n_layers && i >= o->n_layers * c->per_layer) memset(at, 0, site_bytes(s));
        at += site_bytes(s);
    }
    return ERR_NONE;
}

static err_code open_sites(calib *c, const calib_options *o, err_info *e)
{
    const model_config *config = &c->m->config;
    c->per_layer = config->is_moe ? TAP_HEAD : TAP_EXPERT_IN;
    c->n_sites = config->n_layers * c->per_layer + 1;
    if (!(c->sites = mem_array((size_t)c->n_sites, sizeof *c->sites, e))) return e->code;
    for (int64_t layer = 0; layer <= config->n_layers; layer++)
        for (int i = 0; i < count_sites(c, layer); i++)
            name_site(c, layer, first_site(c, layer) + i, o);
    return open_sums(c, o, e);
}

/* ---- the file of Hessians ------------------------------------------------------------------- */

static err_code open_file(calib *c, const calib_options *o, err_info *e)
{
    char(*names)[CALIB_NAME_BYTES + 8] = mem_array((size_t)c->n_sites, sizeof *names, e);
    st_entry *entries = mem_array((size_t)c->n_sites * 2, sizeof *entries, e);
    int64_t n = 0, n_done = 0;
    for (int64_t i = 0; names && entries && i < c->n_sites; i++) {
        const calib_site *s = &c->sites[i];
        if (!s->side) continue;
        snprintf(names[i], sizeof names[i], "%s.counts", s->name);
        st_entry *t = &entries[n];
        t[0] = (st_entry){s->name, ST_F32, 0, {0}};
        if (n_hessians(s) > 1) t[0].shape[t[0].n_dims++] = n_hessians(s);
        t[0].shape[t[0].n_dims++] = s->side;
        t[0].shape[t[0].n_dims++] = s->side;
        t[1] = (st_entry){names[i], ST_I64, 1, {n_hessians(s)}};
        n += 2;
        if (i < o->n_layers * c->per_layer) n_done = n;
    }
    c->n_entries = n_done;
    if (names && entries)
        c->out = o->n_layers ? st_writer_resume(o->hessians, entries, n, o->meta, n_done, e)
                             : st_writer_open(o->hessians, entries, n, o->meta, e);
    mem_free(entries);
    mem_free(names);
    if (!c->out) return e->code;
    if (c->is_kept) st_writer_keep(c->out);
    return ERR_NONE;
}

static err_code write_hessian(calib *c, const calib_site *s, const running *r, err_info *e)
{
    int64_t n = s->side * s->side, bytes = n * (int64_t)sizeof(float);
    for (int64_t i = 0; i < n_hessians(s); i++) {
        float *h = r->h + i * n;
        int64_t *count = &s->counts[i / n_blocks(s)], size = sizeof *count;
        blas_mirror(c->m->pool, h, s->side);
        if (st_writer_put(c->out, c->n_entries, i * bytes, h, bytes, e) ||
            st_writer_put(c->out, c->n_entries + 1, i * size, count, size, e))
            return e->code;
    }
    c->n_entries += 2;
    return ERR_NONE;
}

/* ---- looking at rows ------------------------------------------------------------------------ */

/* Columns that one item of add_sums takes: two kilobytes of sums. */
enum { BAND = 128 };

/* Rows that are gathered before they enter a Hessian, which is read and written as a whole then:
 * experts get a few rows of each batch. */
enum { ROOM = SES_BATCH, EXPERT_ROOM = 64 };

typedef struct sum_loop {
    const tap_rows *rows;
    running *r;
    int64_t n_bands;
} sum_loop;

/* Items are (matrix, band of columns). */
static void add_sums(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const sum_loop *l = ctx;
    const tap_rows *t = l->rows;
    for (int64_t item = begin; item < end; item++) {
        int64_t mat = item / l->n_bands, at = item % l->n_bands * BAND;
        int64_t width = t->cols - at < BAND ? t->cols - at : BAND;
        int64_t first = t->first ? t->first[mat] : 0, last = t->first ? t->first[mat + 1] : t->n;
        double *sums = l->r->sums + mat * t->cols + at, *sums2 = l->r->sums2 + mat * t->cols + at;
        for (int64_t row = first; row < last; row++) {
            const float *x = t->x + row * t->cols + at;
            for (int64_t k = 0; k < width; k++) {
                double v = (double)x[k];
                sums[k] += v;
                sums2[k] += v * v;
            }
        }
    }
}

typedef struct rows_of {
    const float *x;
    int64_t n;
} rows_of;

/* The rows that matrix `mat` of a site met. */
static rows_of find_rows(const tap_rows *t, int64_t mat)
{
    int64_t first = t->first ? t->first[mat] : 0, last = t->first ? t->first[mat + 1] : t->n;
    return (rows_of){t->x + first * t->cols, last - first};
}

/* Gathered rows enter the Hessians where those of `t` would not fit beside them; all do when t is
 * NULL. */
static void flush_rows(calib *c, const calib_site *s, running *r, const tap_rows *t)
{
    int64_t n_jobs = 0, side = s->side;
    for (int64_t i = 0; i < n_hessians(s); i++) {
        int64_t n = r->n_rows[i];
        if (!n || (t && n + find_rows(t, i / n_blocks(s)).n <= r->room)) continue;
        c->jobs[n_jobs++] =
            (blas_gram_job){r->rows + i * r->room * side, n, side, r->h + i * side * side};
        r->n_rows[i] = 0;
    }
    blas_gram(&c->b, c->m->pool, c->jobs, n_jobs);
}

static void add_products(calib *c, const calib_site *s, running *r, const tap_rows *t)
{
    int64_t n_jobs = 0, side = s->side;
    flush_rows(c, s, r, t);
    for (int64_t i = 0; i < n_hessians(s); i++) {
        rows_of met = find_rows(t, i / n_blocks(s));
        if (met.n > r->room) { /* an expert's: elsewhere there is room for a batch */
            c->jobs[n_jobs++] = (blas_gram_job){met.x, met.n, side, r->h + i * side * side};
            continue;
        }
        const float *from = met.x + i % n_blocks(s) * side;
        float *to = r->rows + (i * r->room + r->n_rows[i]) * side;
        for (int64_t row = 0; row < met.n; row++)
            memcpy(to + row * side, from + row * s->cols, (size_t)side * sizeof *to);
        r->n_rows[i] += met.n;
    }
    blas_gram(&c->b, c->m->pool, c->jobs, n_jobs);
}

static void look(void *ctx, const tap_rows *t)
{
    calib *c = ctx;
    calib_site *s = site_at(c, t->layer, t->site);
    running *r = &c->now[t->site];
    for (int64_t mat = 0; mat < s->n_mat; mat++) s->counts[mat] += find_rows(t, mat).n;
    sum_loop l = {t, r, (t->cols + BAND - 1) / BAND};
    pool_for(c->m->pool, s->n_mat * l.n_bands, 4, add_sums, &l);
    if (r->h) add_products(c, s, r, t);
}

/* ---- layers --------------------------------------------------------------------------------- */

static size_t hessian_bytes(const calib_site *s)
{
    return (size_t)(s->n_mat * s->cols * s->side) * sizeof(float);
}

static size_t row_bytes(const calib_site *s, const running *r)
{
    return (size_t)(s->n_mat * r->room * s->cols) * sizeof(float);
}

static void free_running(const calib_site *s, running *r)
{
    mem_free(r->sums);
    mem_free(r->sums2);
    mem_pages_free(r->h, hessian_bytes(s));
    mem_pages_free(r->rows, row_bytes(s, r));
    mem_free(r->n_rows);
    *r = (running){0};
}

static err_code open_running(const calib_site *s, running *r, err_info *e)
{
    size_t n = (size_t)(s->n_mat * s->cols);
    if (!(r->sums = mem_array(n, sizeof *r->sums, e)) ||
        !(r->sums2 = mem_array(n, sizeof *r->sums2, e)))
        return e->code;
    if (!s->side) return ERR_NONE;
    r->room = s->n_mat > 1 ? EXPERT_ROOM : ROOM;
    if (!(r->n_rows = mem_array((size_t)n_hessians(s), sizeof *r->n_rows, e)) ||
        !(r->h = mem_pages(hessian_bytes(s), e)) || !(r->rows = mem_pages(row_bytes(s, r), e)))
        return e->code;
    return ERR_NONE;
}

/* The sums of a site that is done, rounded; its Hessian to the file. */
static err_code end_site(calib *c, calib_site *s, running *r, err_info *e)
{
    for (int64_t i = 0; i < s->n_mat * s->cols; i++) {
        s->sums[i] = (float)r->sums[i];
        s->sums2[i] = (float)r->sums2[i];
        if (!isfinite(s->sums[i]) || !isfinite(s->sums2[i]))
            return err_set(e, ERR_RANGE, "%s: input %lld is not finite, or its sum of squares",
                           s->name, (long long)(i % s->cols));
    }
    if (!r->h) return ERR_NONE;
    flush_rows(c, s, r, NULL);
    return write_hessian(c, s, r, e);
}

static void close_layer(calib *c)
{
    for (int i = 0; c->layer >= 0 && i < count_sites(c, c->layer); i++) {
        int site = first_site(c, c->layer) + i;
        free_running(site_at(c, c->layer, site), &c->now[site]);
    }
    c->layer = -1;
}

static err_code begin_layer(calib *c, int64_t layer, err_info *e)
{
    c->layer = layer;
    for (int i = 0; i < count_sites(c, layer); i++) {
        int site = first_site(c, layer) + i;
        if (open_running(site_at(c, layer, site), &c->now[site], e)) return e->code;
    }
    return ERR_NONE;
}

static err_code end_layer(calib *c, err_info *e)
{
    for (int i = 0; i < count_sites(c, c->layer); i++) {
        int site = first_site(c, c->layer) + i;
        if (end_site(c, site_at(c, c->layer, site), &c->now[site], e)) return e->code;
    }
    close_layer(c);
    return ERR_NONE;
}

static err_code run_step(calib *c, const cancel_flag *cancel, err_info *e)
{
    int64_t done = calib_n_done(c), n = calib_n_steps(c) / (c->m->config.n_layers + 1);
    if (done == calib_n_steps(c)) return ERR_NONE;
    if (done % n == 0 && begin_layer(c, calib_n_layers(c), e)) return e->code;
    if (layers_step(c->run, cancel, e)) return e->code;
    return calib_n_done(c) % n == 0 ? end_layer(c, e) : ERR_NONE;
}

err_code calib_step(calib *c, const cancel_flag *cancel, err_info *e)
{
    if (!c->failure.code) run_step(c, cancel, &c->failure);
    if (c->failure.code && e) *e = c->failure;
    return c->failure.code;
}

/* ---- opening and closing -------------------------------------------------------------------- */

static err_code open_into(calib *c, const int32_t *ids, const int64_t *first, int64_t n_sequences,
                          const calib_options *o, err_info *e)
{
    char paths[2][PATH_MAX];
    const char *streams[2] = {paths[0], paths[1]};
    c->tap = (tap){look, c};
    c->is_kept = o->dir != NULL;
    layers_options options = {.codec = KV_F32,
                              .tap = &c->tap,
                              .streams = o->dir ? streams : NULL,
                              .n_layers = o->n_layers,
                              .kept = o->kept};
    if (kept_path(o, "stream-0", paths[0], e) || kept_path(o, "stream-1", paths[1], e))
        return e->code;
    if (o->hessians && blas_load(&c->b, e)) return e->code;
    if (!(c->run = layers_open(c->m, ids, first, n_sequences, &options, e))) return e->code;
    if (open_sites(c, o, e)) return e->code;
    int64_t most = 0;
    for (int64_t i = 0; i < c->n_sites; i++)
        if (n_hessians(&c->sites[i]) > most) most = n_hessians(&c->sites[i]);
    if (!(c->jobs = mem_array((size_t)most, sizeof *c->jobs, e))) return e->code;
    return o->hessians && !o->is_written ? open_file(c, o, e) : ERR_NONE;
}

calib *calib_open(model *m, const int32_t *ids, const int64_t *first, int64_t n_sequences,
                  const calib_options *options, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    calib *c = mem_array(1, sizeof *c, e);
    if (!c) return NULL;
    c->m = m;
    c->layer = -1;
    if (open_into(c, ids, first, n_sequences, options, e)) {
        calib_close(c);
        return NULL;
    }
    return c;
}

void calib_close(calib *c)
{
    if (!c) return;
    st_writer_abort(c->out);
    close_layer(c);
    if (c->sums) mem_pages_free(c->sums, c->sum_bytes);
    layers_close(c->run);
    mem_free(c->sites);
    mem_free(c->jobs);
    mem_free(c);
}

err_code calib_keep(calib *c, int *kept, err_info *e)
{
    if (c->failure.code || c->layer >= 0) return err_set(e, ERR_RANGE, "in the middle of a layer");
    if (c->is_kept && map_sync(c->sums, c->sum_bytes, e)) return e->code;
    if (c->out && st_writer_sync(c->out, e)) return e->code;
    return layers_keep(c->run, kept, e);
}

err_code calib_finish(calib *c, err_info *e)
{
    if (!c->out) return ERR_NONE;
    st_writer *w = c->out;
    c->out = NULL;
    return st_writer_finish(w, e);
}

int64_t calib_n_steps(const calib *c)
{
    return layers_n_steps(c->run);
}

int64_t calib_n_done(const calib *c)
{
    return layers_n_done(c->run);
}

int64_t calib_n_layers(const calib *c)
{
    return calib_n_done(c) * (c->m->config.n_layers + 1) / calib_n_steps(c);
}

int64_t calib_n_sites(const calib *c)
{
    return c->n_sites;
}

const calib_site *calib_site_at(const calib *c, int64_t i)
{
    return &c->sites[i];
}
