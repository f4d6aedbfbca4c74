/* Any bytes as a safetensors file: it opens, or fails with one line of text; if it opens, every
 * byte of every tensor can be read. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io/st.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void read_all(const st_set *set)
{
    unsigned sum = 0;
    for (int64_t i = 0; i < st_count(set); i++) {
        const st_tensor *t = st_at(set, i);
        if (st_find(set, t->name) != t) abort();
        if (t->n_bytes != st_elements(t) * st_dtype_bytes(t->dtype)) abort();
        for (int64_t k = 0; k < t->n_bytes; k++) sum += t->data[k];
    }
    const char *format = st_metadata(set, "format");
    if (format) sum += (unsigned)strlen(format);
    volatile unsigned keep = sum;
    (void)keep;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    char path[64];
    err_info e = {0};
    int fd = memfd_create("st_fuzz", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, n_bytes) != (ssize_t)n_bytes) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    st_set *set = st_open(path, &e);
    if (set) read_all(set);
    else if (e.code == ERR_NONE || !e.text[0] || strchr(e.text, '\n')) abort();
    st_close(set);
    close(fd);
    return 0;
}
