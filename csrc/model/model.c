/* model: opening a checkpoint directory. */
#include "model/model.h"

#include <stdio.h>
#include <string.h>

#include "base/mem.h"

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
    pool_close(m->pool);
    weights_free(&m->weights);
    st_close(m->files);
    config_free(&m->config);
    json_close(m->config_json);
    mem_free(m);
}
