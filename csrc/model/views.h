/* views: the matrices of a checkpoint by name, in whatever format they are stored.
 *
 * For those who read weights without running the model: config.json and the tensors are bound as
 * for a forward pass (weights.h), and every matrix is found by the name that weights_each gives
 * it. Immutable after opening; any thread may read. */
#ifndef MODEL_VIEWS_H
#define MODEL_VIEWS_H

#include "base/err.h"
#include "io/st.h"
#include "num/matrix.h"

typedef struct views views;

/* `set` holds the tensors of `dir` and must outlive the views. */
views *views_open(const char *dir, const st_set *set, err_info *e);
void views_close(views *v);

/* NULL if there is none; *name is a copy that lives as long as the views. */
const num_matrix *views_find(const views *v, const char *wanted, const char **name);

#endif
