#include "model/replace.h"

#include <stdio.h>
#include <string.h>

#include "base/mem.h"

typedef struct model_swap model_swap;

struct model_swap {
    model_swap *next;
    num_matrix *at, stored; /* the place, and what the checkpoint has there */
    num_matrix w;           /* what runs; lies in `codes`, one allocation */
    uint8_t *codes, *scales, *biases;
};

/* ---- places --------------------------------------------------------------------------------- */

/* Whether `name` is the matrix that is asked for, or one of the stack. */
static int is_asked_for(const char *name, const char *asked)
{
    static const char stack[] = ".experts.";
    const char *at = strstr(name, stack);
    if (strcmp(name, asked) == 0) return 1;
    if (!at) return 0;
    size_t head = (size_t)(at - name) + sizeof stack - 1;
    return strncmp(name, asked, head) == 0 &&
           strcmp(name + head + strspn(name + head, "0123456789") + 1, asked + head) == 0;
}

typedef struct search {
    const char *asked;
    num_matrix **found; /* NULL to count */
    int64_t n;
} search;

static int look(void *ctx, const char *name, const num_matrix *w)
{
    search *s = ctx;
    if (!is_asked_for(name, s->asked)) return 0;
    if (s->found) s->found[s->n] = (num_matrix *)(uintptr_t)w; /* the model's own, not const */
    s->n++;
    return 0;
}

/* The matrices of that name, to be freed with mem_free; NULL with ERR_RANGE when there is none. */
static num_matrix **find(model *m, const char *name, int64_t *n, err_info *e)
{
    search s = {.asked = name};
    weights_each(&m->weights, &m->config, look, &s);
    if (s.n == 0) {
        err_set(e, ERR_RANGE, "this model has no matrix %s", name);
        return NULL;
    }
    s.found = mem_array((size_t)s.n, sizeof *s.found, e);
    s.n = 0;
    if (s.found) weights_each(&m->weights, &m->config, look, &s);
    *n = s.n;
    return s.found;
}

static model_swap *swap_at(const model *m, const num_matrix *at)
{
    model_swap *s = m->swaps;
    while (s && s->at != at) s = s->next;
    return s;
}

static void put(model *m, num_matrix *at, const num_matrix *w)
{
    *at = *w;
    if (at == &m->weights.embed && m->weights.tied) m->weights.lm_head = *w;
}

const num_matrix *model_stored(const model *m, const num_matrix *at)
{
    int is_tied_head = at == &m->weights.lm_head && m->weights.tied;
    const model_swap *s = swap_at(m, is_tied_head ? &m->weights.embed : at);
    return s ? &s->stored : at;
}

/* ---- swaps ---------------------------------------------------------------------------------- */

/* A swap that is not in the model yet, with room for a matrix that lies like `like`. */
static model_swap *swap_open(const model *m, num_matrix *at, const num_matrix *like, err_info *e)
{
    model_swap *s = mem_array(1, sizeof *s, e);
    if (!s) return NULL;
    *s = (model_swap){.at = at, .stored = *model_stored(m, at), .w = *like};
    int64_t all = num_matrix_bytes(like), codes = like->rows * like->row_bytes, biases = 0;
    if (like->mode == NUM_AFFINE)
        biases = like->rows * (like->cols / like->group) * num_dtype_bytes(like->bias_dtype);
    s->codes = mem_array((size_t)all, 1, e);
    if (!s->codes) {
        mem_free(s);
        return NULL;
    }
    s->scales = s->codes + codes;
    s->biases = s->codes + all - biases;
    s->w.codes = s->codes;
    s->w.scales = all > codes ? s->scales : NULL;
    s->w.biases = biases ? s->biases : NULL;
    return s;
}

static void swap_free(model_swap *s)
{
    if (!s) return;
    mem_free(s->codes);
    mem_free(s);
}

static void undo(model *m, const num_matrix *at)
{
    model_swap **link = &m->swaps;
    while (*link && (*link)->at != at) link = &(*link)->next;
    model_swap *s = *link;
    if (!s) return;
    *link = s->next;
    put(m, s->at, &s->stored);
    swap_free(s);
}

static void install(model *m, model_swap *s)
{
    undo(m, s->at);
    s->next = m->swaps;
    m->swaps = s;
    put(m, s->at, &s->w);
}

err_code model_restore(model *m, const char *name, err_info *e)
{
    if (!name) {
        while (m->swaps) undo(m, m->swaps->at);
        return ERR_NONE;
    }
    int64_t n;
    num_matrix **places = find(m, name, &n, e);
    if (!places) return e->code;
    for (int64_t i = 0; i < n; i++) undo(m, places[i]);
    mem_free(places);
    return ERR_NONE;
}

err_code model_replace(model *m, const char *name, const num_matrix *with, err_info *e)
{
    int64_t n;
    num_matrix **places = find(m, name, &n, e), *at = places ? places[0] : NULL;
    mem_free(places);
    if (!at) return e->code;
    if (n > 1) return err_set(e, ERR_RANGE, "%s is a stack: name one expert", name);
    if (with->rows != at->rows || with->cols != at->cols)
        return err_set(e, ERR_RANGE, "%s is [%lld, %lld], not [%lld, %lld]", name,
                       (long long)at->rows, (long long)at->cols, (long long)with->rows,
                       (long long)with->cols);
    model_swap *s = swap_open(m, at, with, e);
    if (!s) return e->code;
    size_t all = (size_t)num_matrix_bytes(with);
    memcpy(s->codes, with->codes, (size_t)(s->scales - s->codes));
    if (with->scales) memcpy(s->scales, with->scales, (size_t)(s->biases - s->scales));
    if (with->biases) memcpy(s->biases, with->biases, (size_t)(s->codes + all - s->biases));
    install(m, s);
    return ERR_NONE;
}

/* ---- encoding ------------------------------------------------------------------------------- */

typedef struct encode_loop {
    const model *m;
    const model_encoding *how;
    const float *importance; /* [cols] of this matrix, or NULL */
    model_swap *to;
    float *rows;         /* per worker [cols] */
    atomic_llong failed; /* lowest row with a weight that has no encoding */
} encode_loop;

/* The column that has none, or -1. */
static int64_t encode_row(const encode_loop *l, int64_t r, float *x)
{
    const num_matrix *from = &l->to->stored;
    const num_format *f = &l->how->format;
    uint8_t *codes = l->to->codes + r * l->to->w.row_bytes;
    uint8_t *scales = l->to->scales + r * num_format_scale_bytes(f, from->cols);
    uint8_t *biases = l->to->biases + r * num_format_bias_bytes(f, from->cols);
    l->m->ops->decode[from->mode](from, r, x);
    if (l->how->fit == NUM_FIT_MINMAX)
        return num_encode_row(f, x, from->cols, codes, scales, biases);
    return num_fit_row(f, l->how->fit, l->m->ops->fit, x, l->importance, from->cols, codes, scales,
                       biases);
}

static void encode_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    encode_loop *l = ctx;
    for (int64_t r = begin; r < end; r++) {
        long long lowest = atomic_load(&l->failed);
        if (encode_row(l, r, l->rows + worker * l->to->stored.cols) < 0) continue;
        while (r < lowest && !atomic_compare_exchange_weak(&l->failed, &lowest, r)) continue;
    }
}

/* A swap with matrix i of those named encoded. */
static model_swap *encode(const model *m, const char *name, num_matrix *at, int64_t i,
                          const model_encoding *how, float *rows, err_info *e)
{
    num_matrix like = num_format_matrix(&how->format, at->rows, at->cols, NULL, NULL, NULL);
    model_swap *s = swap_open(m, at, &like, e);
    if (!s) return NULL;
    int64_t of_matrix = how->n_importance > at->cols ? i * at->cols : 0;
    encode_loop l = {m, how,  how->importance ? how->importance + of_matrix : NULL,
                     s, rows, INT64_MAX};
    pool_for(m->pool, at->rows, 8, encode_rows, &l);
    long long failed = atomic_load(&l.failed);
    if (failed == INT64_MAX) return s;
    int64_t k = encode_row(&l, failed, rows);
    err_set(e, ERR_FORMAT, "%s: row %lld column %lld: %g cannot be encoded", name, failed,
            (long long)k, (double)rows[k]);
    swap_free(s);
    return NULL;
}

static err_code check_encoding(const char *name, const model_encoding *how, int64_t cols, int64_t n,
                               err_info *e)
{
    if (num_format_check(&how->format, cols, e) || num_fit_check(&how->format, how->fit, e))
        return err_prefix(e, "%s", name);
    if (how->importance && how->n_importance != cols && how->n_importance != n * cols)
        return err_set(e, ERR_RANGE, "%s: importance of %lld inputs, not %lld", name,
                       (long long)how->n_importance, (long long)cols);
    return ERR_NONE;
}

static err_code encode_all(model *m, const char *name, const model_encoding *how,
                           num_matrix **places, model_swap **done, int64_t n,
                           const cancel_flag *cancel, err_info *e)
{
    int64_t cols = places[0]->cols;
    model_encoding whole = *how;
    if (whole.format.group == 0) whole.format.group = cols;
    err_code code = check_encoding(name, &whole, cols, n, e);
    if (code) return code;
    float *rows = mem_array((size_t)(cols * pool_n_threads(m->pool)), sizeof *rows, e);
    if (!rows) return ERR_MEMORY;
    for (int64_t i = 0; i < n && !code; i++) {
        if (cancel_raised(cancel))
            code = err_set(e, ERR_CANCELLED, "interrupted");
        else if (!(done[i] = encode(m, name, places[i], i, &whole, rows, e)))
            code = e->code;
    }
    mem_free(rows);
    return code;
}

err_code model_encode(model *m, const char *name, const model_encoding *encoding,
                      const cancel_flag *cancel, int64_t *n_bytes, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    int64_t n;
    num_matrix **places = find(m, name, &n, e);
    if (!places) return e->code;
    model_swap **done = mem_array((size_t)n, sizeof *done, e);
    err_code code = done ? encode_all(m, name, encoding, places, done, n, cancel, e) : ERR_MEMORY;
    *n_bytes = 0;
    for (int64_t i = 0; done && i < n; i++) {
        if (code) {
            swap_free(done[i]);
            continue;
        }
        *n_bytes += num_matrix_bytes(&done[i]->w);
        install(m, done[i]);
    }
    mem_free(done);
    mem_free(places);
    return code;
}
