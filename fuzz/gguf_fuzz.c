/* Any bytes as a GGUF file and as an imatrix: each opens, or fails with one line of text; if it
 * opens, everything in it can be read. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io/gguf.h"
#include "io/imatrix.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static int count_bytes(void *ctx, const char *s, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i++) *(unsigned *)ctx += (unsigned char)s[i];
    return 0;
}

static unsigned read_gguf(const gguf_file *f)
{
    unsigned sum = 0;
    for (int64_t i = 0; i < gguf_n_values(f); i++) {
        const gguf_value *v = gguf_value_at(f, i);
        if (gguf_find(f, v->key) != v) abort();
        gguf_each_string(v, count_bytes, &sum);
        for (int64_t k = 0; k < v->n; k++)
            sum += (unsigned)gguf_int(v, k, 1) + (gguf_float(v, k, 0) > 1);
    }
    for (int64_t i = 0; i < gguf_n_tensors(f); i++) {
        const gguf_tensor *t = gguf_tensor_at(f, i);
        if (gguf_find_tensor(f, t->name) != t) abort();
        for (int64_t k = 0; k < t->n_bytes; k++) sum += t->data[k];
    }
    return sum;
}

static unsigned read_imatrix(const imx_set *set)
{
    unsigned sum = 0;
    for (int64_t i = 0; i < imx_count(set); i++) {
        const imx_entry *t = imx_at(set, i);
        if (imx_find(set, t->name) != t) abort();
        int64_t n_mat = t->n_in ? t->n_values / t->n_in : 1;
        if (!imx_fits(t, t->n_values / n_mat, n_mat)) abort();
        float *out = malloc((size_t)(t->n_values / n_mat) * sizeof *out);
        for (int64_t m = -1; m < n_mat && m < 64; m++)
            if (imx_mean_squares(t, n_mat, m, out) > 0)
                for (int64_t k = 0; k < t->n_values / n_mat; k++) {
                    if (!(out[k] >= 0)) abort();
                    sum += out[k] > 1;
                }
        free(out);
    }
    return sum;
}

static void check_failure(const err_info *e)
{
    if (e->code == ERR_NONE || !e->text[0] || strchr(e->text, '\n')) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    char path[64];
    err_info e = {0};
    int fd = memfd_create("gguf_fuzz", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, n_bytes) != (ssize_t)n_bytes) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    volatile unsigned keep = 0;
    gguf_file *f = gguf_open(path, &e);
    if (f) keep += read_gguf(f);
    else check_failure(&e);
    gguf_close(f);
    const char *paths[] = {path, path};
    for (int64_t n = 1; n <= 2; n++) {
        e = (err_info){0};
        imx_set *set = imx_open(paths, n, &e);
        if (set) keep += read_imatrix(set);
        else check_failure(&e);
        imx_close(set);
    }
    close(fd);
    return 0;
}
