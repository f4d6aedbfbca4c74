#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "io/file.h"
#include "io/json.h"
#include "io/st.h"
#include "io/st_header.h"

enum { DATA_ALIGN = 64 };

typedef struct st_slot {
    char *name; /* owned */
    int64_t offset, n_bytes;
    atomic_llong n_put;
} st_slot;

struct st_writer {
    char *path, *partial; /* owned */
    int fd, has_partial;  /* has_partial: the file is ours, to remove */
    st_slot *slots;       /* [n_slots] */
    int64_t n_slots;
};

static err_code os_error(const st_writer *w, const char *what, int error, err_info *e)
{
    return err_set(e, ERR_IO, "%s: %s: %s", w->partial, what, strerror(error));
}

/* ---- header ----------------------------------------------------------------------------- */

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static err_code check_unique(const st_writer *w, err_info *e)
{
    const char **names = mem_array((size_t)w->n_slots, sizeof *names, e);
    if (!names) return ERR_MEMORY;
    err_code code = ERR_NONE;
    for (int64_t i = 0; i < w->n_slots; i++) names[i] = w->slots[i].name;
    qsort(names, (size_t)w->n_slots, sizeof *names, by_text);
    for (int64_t i = 1; i < w->n_slots && !code; i++)
        if (strcmp(names[i - 1], names[i]) == 0)
            code = err_set(e, ERR_RANGE, "%s: tensor %s is given twice", w->path, names[i]);
    mem_free(names);
    return code;
}

/* Slots with offsets from the start of the data; *data_bytes is their sum. */
static err_code lay_out(st_writer *w, const st_entry *entries, int64_t *data_bytes, err_info *e)
{
    int64_t at = 0;
    for (int64_t i = 0; i < w->n_slots; i++) {
        const st_entry *t = &entries[i];
        st_slot *s = &w->slots[i];
        if (!st_plain_name(t->name) || strlen(t->name) > ST_NAME_LIMIT ||
            strcmp(t->name, "__metadata__") == 0)
            return err_set(e, ERR_RANGE, "%s: tensor %lld has no usable name", w->path,
                           (long long)i);
        int64_t end;
        if ((unsigned)t->dtype >= ST_N_DTYPES || t->n_dims < 0 || t->n_dims > ST_MAX_DIMS ||
            !st_shape_bytes(t->dtype, t->n_dims, t->shape, &s->n_bytes) ||
            __builtin_add_overflow(at, s->n_bytes, &end))
            return err_set(e, ERR_RANGE, "%s: tensor %s: impossible dtype or shape", w->path,
                           t->name);
        s->name = mem_copy(t->name, strlen(t->name), e);
        if (!s->name) return ERR_MEMORY;
        s->offset = at;
        at = end;
    }
    *data_bytes = at;
    return check_unique(w, e);
}

/* Upper bound of write_header's text. */
static size_t header_room(const st_writer *w, const char *const *metadata)
{
    size_t n = 64 + DATA_ALIGN;
    for (int64_t i = 0; i < w->n_slots; i++)
        n += 6 * strlen(w->slots[i].name) + 96 + 21 * (ST_MAX_DIMS + 2);
    for (; metadata && *metadata; metadata++) n += 6 * strlen(*metadata) + 4;
    return n;
}

static char *put_text(char *p, const char *s)
{
    size_t n = strlen(s);
    memcpy(p, s, n);
    return p + n;
}

static char *put_quoted(char *p, const char *s)
{
    return p + json_quote(p, s, strlen(s), 0);
}

/* The length prefix and the JSON text, padded with spaces; returns its size. */
static size_t write_header(char *out, const st_writer *w, const st_entry *entries,
                           const char *const *metadata)
{
    char *p = put_text(out + 8, "{");
    if (metadata && metadata[0]) {
        p = put_text(p, "\"__metadata__\":{");
        for (int64_t i = 0; metadata[i]; i += 2) {
            p = put_quoted(i ? put_text(p, ",") : p, metadata[i]);
            p = put_quoted(put_text(p, ":"), metadata[i + 1]);
        }
        p = put_text(p, w->n_slots ? "}," : "}");
    }
    for (int64_t i = 0; i < w->n_slots; i++) {
        const st_slot *s = &w->slots[i];
        p = put_quoted(i ? put_text(p, ",") : p, s->name);
        p += sprintf(p, ":{\"dtype\":\"%s\",\"shape\":[", st_dtype_name(entries[i].dtype));
        for (int d = 0; d < entries[i].n_dims; d++)
            p += sprintf(p, "%s%lld", d ? "," : "", (long long)entries[i].shape[d]);
        p += sprintf(p, "],\"data_offsets\":[%lld,%lld]}", (long long)s->offset,
                     (long long)(s->offset + s->n_bytes));
    }
    p = put_text(p, "}");
    while ((p - out) % DATA_ALIGN) *p++ = ' ';
    size_t n = (size_t)(p - out) - 8;
    for (int i = 0; i < 8; i++) out[i] = (char)(n >> (8 * i) & 0xff);
    return n + 8;
}

/* ---- file ------------------------------------------------------------------------------- */

static err_code put_bytes(st_writer *w, int64_t at, const void *data, int64_t n_bytes, err_info *e)
{
    const char *p = data;
    while (n_bytes > 0) {
        ssize_t n = pwrite(w->fd, p, (size_t)n_bytes, at);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return os_error(w, "cannot write", errno, e);
        p += n;
        at += n;
        n_bytes -= n;
    }
    return ERR_NONE;
}

/* Reserves the whole file before anything is computed for it. */
static err_code reserve(st_writer *w, int64_t n_bytes, err_info *e)
{
    int error;
    do error = posix_fallocate(w->fd, 0, n_bytes);
    while (error == EINTR);
    if (!error) return ERR_NONE;
    return err_set(e, ERR_IO, "%s: cannot reserve %lld bytes: %s", w->partial, (long long)n_bytes,
                   strerror(error));
}

/* A new file that begins with this header. */
static err_code start(st_writer *w, const char *header, int64_t header_bytes, int64_t n_bytes,
                      err_info *e)
{
    w->fd = file_claim(w->partial, e);
    if (w->fd < 0) return e ? e->code : ERR_IO;
    w->has_partial = 1;
    if (reserve(w, n_bytes, e)) return e ? e->code : ERR_IO;
    return put_bytes(w, 0, header, header_bytes, e);
}

/* The file that is there, if it begins with this header and has the size that was reserved: what a
 * shorter one lost may have been written. */
static err_code go_on(st_writer *w, const char *header, int64_t header_bytes, int64_t n_bytes,
                      err_info *e)
{
    w->fd = open(w->partial, O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (w->fd < 0) return err_set(e, ERR_IO, "%s: %s", w->partial, strerror(errno));
    struct stat st;
    if (fstat(w->fd, &st) != 0) return os_error(w, "cannot measure", errno, e);
    if (st.st_size != n_bytes)
        return err_set(e, ERR_FORMAT, "%s: has not the %lld bytes that it was left with",
                       w->partial, (long long)n_bytes);
    char *found = mem_array((size_t)header_bytes, 1, e);
    if (!found) return ERR_MEMORY;
    int same = pread(w->fd, found, (size_t)header_bytes, 0) == header_bytes &&
               memcmp(found, header, (size_t)header_bytes) == 0;
    mem_free(found);
    return same ? ERR_NONE
                : err_set(e, ERR_FORMAT, "%s: is not the beginning of this file", w->partial);
}

static err_code begin(st_writer *w, const st_entry *entries, const char *const *metadata,
                      int64_t n_done, err_info *e)
{
    int64_t data_bytes = 0, n_bytes;
    err_code code = lay_out(w, entries, &data_bytes, e);
    if (code) return code;
    char *header = mem_array(header_room(w, metadata), 1, e);
    if (!header) return ERR_MEMORY;
    int64_t data_at = (int64_t)write_header(header, w, entries, metadata);
    if (data_at - 8 > ST_HEADER_LIMIT) {
        code = err_set(e, ERR_LIMIT, "%s: header of %lld bytes, the limit is %d", w->path,
                       (long long)data_at - 8, ST_HEADER_LIMIT);
    } else if (__builtin_add_overflow(data_at, data_bytes, &n_bytes)) {
        code = err_set(e, ERR_RANGE, "%s: more than 2^63 bytes", w->path);
    } else {
        for (int64_t i = 0; i < w->n_slots; i++) {
            w->slots[i].offset += data_at;
            if (i < n_done) w->slots[i].n_put = w->slots[i].n_bytes;
        }
        code = n_done < 0 ? start(w, header, data_at, n_bytes, e)
                          : go_on(w, header, data_at, n_bytes, e);
    }
    mem_free(header);
    return code;
}

static st_writer *open_writer(const char *path, const st_entry *entries, int64_t n_entries,
                              const char *const *metadata, int64_t n_done, err_info *e)
{
    st_writer *w = mem_array(1, sizeof *w, e);
    if (!w) return NULL;
    size_t n = strlen(path);
    w->fd = -1;
    w->path = mem_copy(path, n, e);
    w->partial = mem_array(n + sizeof ".partial", 1, e);
    w->slots = mem_array((size_t)n_entries, sizeof *w->slots, e);
    if (!w->path || !w->partial || !w->slots) {
        st_writer_abort(w);
        return NULL;
    }
    memcpy(w->partial, path, n);
    memcpy(w->partial + n, ".partial", sizeof ".partial");
    w->n_slots = n_entries;
    if (begin(w, entries, metadata, n_done, e)) {
        st_writer_abort(w);
        return NULL;
    }
    return w;
}

st_writer *st_writer_open(const char *path, const st_entry *entries, int64_t n_entries,
                          const char *const *metadata, err_info *e)
{
    char target[PATH_MAX];
    if (file_target(path, target, e)) return NULL;
    return open_writer(target, entries, n_entries, metadata, -1, e);
}

st_writer *st_writer_resume(const char *path, const st_entry *entries, int64_t n_entries,
                            const char *const *metadata, int64_t n_done, err_info *e)
{
    if (n_done >= 0 && n_done <= n_entries)
        return open_writer(path, entries, n_entries, metadata, n_done, e);
    err_set(e, ERR_RANGE, "%s: %lld of %lld tensors written", path, (long long)n_done,
            (long long)n_entries);
    return NULL;
}

err_code st_writer_put(st_writer *w, int64_t i, int64_t at, const void *data, int64_t n_bytes,
                       err_info *e)
{
    if (i < 0 || i >= w->n_slots)
        return err_set(e, ERR_RANGE, "%s: there is no tensor %lld", w->path, (long long)i);
    st_slot *s = &w->slots[i];
    if (at < 0 || n_bytes < 0 || at > s->n_bytes || n_bytes > s->n_bytes - at)
        return err_set(e, ERR_RANGE, "%s: tensor %s: bytes %lld + %lld of %lld", w->path, s->name,
                       (long long)at, (long long)n_bytes, (long long)s->n_bytes);
    err_code code = put_bytes(w, s->offset + at, data, n_bytes, e);
    if (!code) atomic_fetch_add(&s->n_put, n_bytes);
    return code;
}

err_code st_writer_sync(st_writer *w, err_info *e)
{
    return fdatasync(w->fd) == 0 ? ERR_NONE : os_error(w, "cannot sync", errno, e);
}

/* The new name must be on the disk too before the old contents may be forgotten. */
static err_code sync_directory(const st_writer *w, err_info *e)
{
    const char *slash = strrchr(w->path, '/');
    size_t n = slash ? (size_t)(slash - w->path) + 1 : 0;
    char *dir = mem_copy(n ? w->path : ".", n ? n : 1, e);
    if (!dir) return ERR_MEMORY;
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    mem_free(dir);
    /* Some file systems cannot sync a directory and say EINVAL. */
    int failed = fd < 0 || (fsync(fd) != 0 && errno != EINVAL);
    int error = errno;
    if (fd >= 0) close(fd);
    return failed ? os_error(w, "cannot sync the directory", error, e) : ERR_NONE;
}

static err_code commit(st_writer *w, err_info *e)
{
    for (int64_t i = 0; i < w->n_slots; i++) {
        const st_slot *s = &w->slots[i];
        if (s->n_put != s->n_bytes)
            return err_set(e, ERR_RANGE, "%s: tensor %s: %lld of %lld bytes were written", w->path,
                           s->name, (long long)s->n_put, (long long)s->n_bytes);
    }
    err_code code = file_settle(w->fd, w->partial, w->path, e);
    if (code) return code;
    w->has_partial = 0;
    return sync_directory(w, e);
}

err_code st_writer_finish(st_writer *w, err_info *e)
{
    err_code code = commit(w, e);
    st_writer_abort(w);
    return code;
}

void st_writer_keep(st_writer *w)
{
    w->has_partial = 0;
}

void st_writer_abort(st_writer *w)
{
    if (!w) return;
    if (w->has_partial)
        file_unclaim(w->fd, w->partial);
    else if (w->fd >= 0)
        close(w->fd);
    for (int64_t i = 0; i < w->n_slots; i++) mem_free(w->slots[i].name);
    mem_free(w->slots);
    mem_free(w->partial);
    mem_free(w->path);
    mem_free(w);
}
