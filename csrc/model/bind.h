/* bind: what the files of the weight binder share; private to the model room and to
 * the binding that inspects layouts.
 *
 *   bind.c         which tensor belongs where: prefixes, layers, expert layouts, leftovers
 *   bind_tensor.c  one tensor: found, marked as used, its dtype and shape checked, vectors widened
 *   bind_matrix.c  one module's matrix: plain or MLX
 *   bind_ct.c      one module's matrix: compressed-tensors and block-scaled FP8
 *
 * All functions report through b->e, which is never NULL. */
#ifndef MODEL_BIND_H
#define MODEL_BIND_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "io/json.h"
#include "io/st.h"
#include "model/weights.h"
#include "num/matrix.h"

enum { BIND_NAME = 256 };

typedef struct bind_arena bind_arena; /* blocks that live as long as the weights */

typedef struct binder {
    const st_set *set;
    const json_value *mlx; /* config.json's MLX block; NULL if there is none */
    const json_value *ct;  /* its compressed-tensors block */
    int64_t fp8_block[2];  /* rows, columns of weight_block_size; 0 if not given */
    char prefix[64];       /* of the text stack: "model." */
    uint8_t *used;         /* [st_count(set)] */
    bind_arena *arena;
    int n_mlx, n_packed; /* modules met in formats of MLX and compressed-tensors */
    int says_untied;     /* config.json denies tying in so many words */
    err_info *e;
} binder;

/* Reads the quantization blocks of config.json (root may be NULL); refuses foreign methods. */
err_code bind_open(binder *b, const st_set *set, const json_value *root, err_info *e);
/* Frees all but the arena, which passes to the caller. */
void bind_close(binder *b);

/* n * size zeroed bytes, freed by bind_arena_free. NULL on failure. */
void *bind_alloc(binder *b, size_t n, size_t size);
void bind_arena_free(bind_arena *a);

/* out[BIND_NAME] = a followed by c; a may be out itself. Cut when too long, which no tensor's name
 * then equals. */
void bind_join(char *out, const char *a, const char *c);

/* ---- one tensor ----------------------------------------------------------------------------- */

/* The tensor `module` + `suffix`, marked as used; NULL if absent. */
const st_tensor *bind_find(binder *b, const char *module, const char *suffix);
int bind_has(const binder *b, const char *module, const char *suffix);
err_code bind_missing(binder *b, const char *module, const char *suffix);

/* Does t have this shape? Names both shapes if not. */
err_code bind_shape(binder *b, const st_tensor *t, int n_dims, const int64_t *dims);
err_code bind_wrong_dtype(binder *b, const st_tensor *t, const char *expected);

/* Bits per code of `cols` codes in `words` 32-bit words; 0 if they do not fill them exactly. */
int bind_code_bits(int64_t words, int64_t cols);

/* F32, F16 or BF16 as a num_dtype; -1 for others. */
int bind_float(st_dtype dtype);
float bind_float_at(const st_tensor *t, int64_t i);

/* A vector [n] (or a tensor of n_dims) widened to f32, with `add` added in f32. Refuses values
 * that are not finite: these vectors touch every token, and are small enough to look at. */
err_code bind_vector(binder *b, const char *name, int n_dims, const int64_t *dims, float add,
                     const float **out);

/* ---- one matrix ----------------------------------------------------------------------------- */

/* The matrices of one module: n of them stacked in the first dimension, or one alone (n == 0). */
typedef struct bind_stack {
    num_matrix all;         /* [max(n, 1) * rows, cols] */
    const st_tensor *scale; /* MLX global_scale [n]; NULL if there is none */
} bind_stack;

/* Finds the module in whatever format its tensors say, and checks them against each other, the
 * expected shape and config.json. */
err_code bind_module(binder *b, const char *module, int64_t n, int64_t rows, int64_t cols,
                     bind_stack *out);
/* Stacked experts without ".weight" in the name, as transformers fuses them: [n, rows, cols]. */
err_code bind_fused(binder *b, const char *name, int64_t n, int64_t rows, int64_t cols,
                    bind_stack *out);
err_code bind_matrix(binder *b, const char *module, int64_t rows, int64_t cols, num_matrix *out);

/* Rows [first, first + n_rows) of matrix i (`rows` each) of a stack. */
num_matrix bind_slice(const bind_stack *s, int64_t i, int64_t rows, int64_t first, int64_t n_rows);

/* What bind_module hands on: m->rows and m->cols are set, the rest is filled in. */
err_code bind_packed(binder *b, const char *module, num_matrix *m);
err_code bind_fp8(binder *b, const char *module, const st_tensor *weight, const char *scale_name,
                  int64_t n, int64_t rows, num_matrix *m);

#endif
