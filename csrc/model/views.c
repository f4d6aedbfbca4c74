#include "model/views.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "io/json.h"
#include "model/config.h"
#include "model/model.h"
#include "model/weights.h"

typedef struct view {
    char *name; /* owned */
    num_matrix matrix;
} view;

struct views {
    json_doc *json;
    model_config config;
    weights weights;
    view *list; /* [n] sorted by name */
    size_t n, room;
};

typedef struct collect {
    views *v;
    err_info *e;
} collect;

static int add(void *ctx, const char *name, const num_matrix *m)
{
    collect *k = ctx;
    views *v = k->v;
    if (v->n == v->room) {
        size_t room = 2 * v->room + 64;
        view *list = mem_array(room, sizeof *list, k->e);
        if (!list) return ERR_MEMORY;
        if (v->n) memcpy(list, v->list, v->n * sizeof *list);
        mem_free(v->list);
        v->list = list;
        v->room = room;
    }
    char *copy = mem_copy(name, strlen(name), k->e);
    if (!copy) return ERR_MEMORY;
    v->list[v->n++] = (view){copy, *m};
    return 0;
}

static int by_name(const void *a, const void *b)
{
    const view *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static err_code bind_all(views *v, const char *dir, const st_set *set, err_info *e)
{
    v->json = model_read_config(dir, e);
    if (!v->json) return e->code;
    const json_value *root = json_root(v->json);
    collect k = {v, e};
    if (config_read(&v->config, root, e) || weights_bind(&v->weights, &v->config, set, root, e))
        return err_prefix(e, "%s", dir);
    if (weights_each(&v->weights, &v->config, add, &k)) return e->code;
    qsort(v->list, v->n, sizeof *v->list, by_name);
    return ERR_NONE;
}

views *views_open(const char *dir, const st_set *set, err_info *e)
{
    err_info own = {0};
    if (!e) e = &own;
    views *v = mem_array(1, sizeof *v, e);
    if (!v) return NULL;
    if (bind_all(v, dir, set, e)) {
        views_close(v);
        return NULL;
    }
    return v;
}

void views_close(views *v)
{
    if (!v) return;
    for (size_t i = 0; i < v->n; i++) mem_free(v->list[i].name);
    mem_free(v->list);
    weights_free(&v->weights);
    config_free(&v->config);
    json_close(v->json);
    mem_free(v);
}

const num_matrix *views_find(const views *v, const char *wanted, const char **name)
{
    view key = {.name = (char *)(uintptr_t)wanted};
    const view *found = v->n ? bsearch(&key, v->list, v->n, sizeof key, by_name) : NULL;
    if (!found) return NULL;
    *name = found->name;
    return &found->matrix;
}
