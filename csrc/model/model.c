/* model: opening a checkpoint directory. */
#include "model/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "model/pass.h"
#include "model/replace.h"
#include "num/fp.h"

json_doc *model_read_config(const char *dir, err_info *e)
{
    char path[4096];
    int n = snprintf(path, sizeof path, "%s/config.json", dir);
    if (n < 0 || (size_t)n >= sizeof path) {
        err_set(e, ERR_LIMIT, "%.100s...: path is longer than %zu bytes", dir, sizeof path);
        return NULL;
    }
    return json_read_file(path, e);
}

static err_code open_into(model *m, const char *dir, const model_options *options, err_info *e)
{
    if (!(m->config_json = model_read_config(dir, e))) return e->code;
    const json_value *root = json_root(m->config_json);
    if (config_read(&m->config, root, e)) return err_prefix(e, "%s", dir);
    if (!(m->files = st_open(dir, e))) return e->code;
    if (weights_bind(&m->weights, &m->config, m->files, root, e)) return err_prefix(e, "%s", dir);
    m->ops = kern_select(options->level);
    m->int8 = options->int8;
    m->pool = pool_open(options->n_threads ? options->n_threads : cpu_count(), e);
    return m->pool ? ERR_NONE : e->code;
}

model *model_open(const char *dir, const model_options *options, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    model *m = mem_array(1, sizeof *m, e);
    if (!m) return NULL;
    if (open_into(m, dir, options, e)) {
        model_close(m);
        return NULL;
    }
    return m;
}

void model_close(model *m)
{
    if (!m) return;
    model_restore(m, NULL, NULL);
    pass_close(m->pass);
    for (int i = 0; i < KV_N_CODECS; i++) kv_pool_close(m->kv[i]);
    pool_close(m->pool);
    weights_free(&m->weights);
    st_close(m->files);
    config_free(&m->config);
    json_close(m->config_json);
    mem_free(m);
}

int64_t model_kv_pages(const model *m, kv_codec codec, int64_t *n_kept, int64_t *page_bytes)
{
    const kv_pool *kv = m->kv[codec];
    *n_kept = kv ? kv_pool_n_kept(kv) : 0;
    *page_bytes = kv ? kv_pool_page_bytes(kv) : 0;
    return kv ? kv_pool_n_used(kv) : 0;
}

typedef struct finite_scan {
    const model *m;
    float *row; /* [widest matrix] */
    int64_t n_row;
    err_info *e;
} finite_scan;

/* The first column that is not finite, or -1. Rows are nearly always clean, so they are looked at
 * whole first, in a loop that compilers turn into vector code. */
static int64_t not_finite(const float *row, int64_t n)
{
    uint32_t largest = 0;
    for (int64_t k = 0; k < n; k++) {
        uint32_t magnitude = fp_bits(row[k]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest < 0x7f800000) return -1;
    int64_t k = 0;
    while (isfinite(row[k])) k++;
    return k;
}

static int scan_matrix(void *ctx, const char *name, const num_matrix *w)
{
    finite_scan *scan = ctx;
    if (w->cols > scan->n_row) {
        mem_free(scan->row);
        scan->n_row = w->cols;
        scan->row = mem_array((size_t)w->cols, sizeof *scan->row, scan->e);
        if (!scan->row) return ERR_MEMORY;
    }
    for (int64_t r = 0; r < w->rows; r++) {
        scan->m->ops->decode[w->mode](w, r, scan->row);
        int64_t k = not_finite(scan->row, w->cols);
        if (k >= 0)
            return err_set(scan->e, ERR_FORMAT, "%s is %f at row %lld, column %lld", name,
                           (double)scan->row[k], (long long)r, (long long)k);
    }
    return ERR_NONE;
}

err_code model_check_finite(const model *m, err_info *e)
{
    err_info local;
    finite_scan scan = {.m = m, .e = e ? e : &local};
    err_code code = (err_code)weights_each(&m->weights, &m->config, scan_matrix, &scan);
    mem_free(scan.row);
    return code;
}
