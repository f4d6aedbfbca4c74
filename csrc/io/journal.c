#include "io/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/mem.h"

/* Far above the lines of the largest checkpoint. */
enum { MAX_BYTES = 256 << 20 };

struct journal {
    int fd;
    char *path, *text;       /* owned */
    size_t n_bytes, n_lines; /* n_lines: bytes up to the last newline */
    int is_cut;
};

static err_code fail(const journal *j, const char *what, err_info *e)
{
    return err_set(e, ERR_IO, "%s: cannot %s: %s", j->path, what, strerror(errno));
}

static err_code lock(journal *j, err_info *e)
{
    struct stat st;
    if (flock(j->fd, LOCK_EX | LOCK_NB) != 0)
        return errno == EWOULDBLOCK
                   ? err_set(e, ERR_BUSY, "%s: another process is writing it", j->path)
                   : fail(j, "lock", e);
    if (fstat(j->fd, &st) != 0) return fail(j, "measure", e);
    if (st.st_nlink == 0) { /* its owner finished between our open and our lock */
        errno = ENOENT;
        return fail(j, "open", e);
    }
    if (!S_ISREG(st.st_mode) || st.st_size > MAX_BYTES)
        return err_set(e, ERR_FORMAT, "%s: not a journal", j->path);
    j->n_bytes = (size_t)st.st_size;
    return ERR_NONE;
}

/* Changes nothing: whose file it is, the caller has yet to judge. */
static err_code read_lines(journal *j, err_info *e)
{
    size_t n = 0;
    j->text = mem_array(j->n_bytes + 1, 1, e);
    if (!j->text) return ERR_MEMORY;
    while (n < j->n_bytes) {
        ssize_t got = pread(j->fd, j->text + n, j->n_bytes - n, (off_t)n);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail(j, "read", e);
        if (got == 0) break;
        n += (size_t)got;
    }
    j->text[n] = 0;
    j->n_bytes = n;
    while (n > 0 && j->text[n - 1] != '\n') n--;
    j->n_lines = n;
    return ERR_NONE;
}

static journal *open_file(const char *path, int flags, err_info *e)
{
    journal *j = mem_array(1, sizeof *j, e);
    if (!j) return NULL;
    j->fd = -1;
    j->path = mem_copy(path, strlen(path), e);
    if (j->path) {
        j->fd = open(path, flags | O_RDWR | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0666);
        if (j->fd < 0) fail(j, "open", e);
    }
    if (j->fd < 0 || lock(j, e) || read_lines(j, e)) {
        journal_close(j);
        return NULL;
    }
    return j;
}

journal *journal_create(const char *path, err_info *e)
{
    return open_file(path, O_CREAT | O_EXCL, e);
}

journal *journal_open(const char *path, err_info *e)
{
    return open_file(path, 0, e);
}

const char *journal_text(const journal *j, size_t *n_bytes)
{
    *n_bytes = j->n_lines;
    return j->text;
}

const char *journal_tail(const journal *j, size_t *n_bytes)
{
    *n_bytes = j->n_bytes - j->n_lines;
    return j->text + j->n_lines;
}

/* Half a line would make one with the next. */
static err_code take_back(const journal *j, off_t end, err_info *e)
{
    errno = ENOSPC;
    fail(j, "write", e);
    if (ftruncate(j->fd, end) != 0) return fail(j, "truncate", e);
    return ERR_IO;
}

err_code journal_append(journal *j, const char *line, size_t n_bytes, err_info *e)
{
    struct iovec parts[] = {{(void *)(uintptr_t)line, n_bytes}, {"\n", 1}};
    if (!j->is_cut && ftruncate(j->fd, (off_t)j->n_lines) != 0) return fail(j, "truncate", e);
    j->is_cut = 1;
    off_t end = lseek(j->fd, 0, SEEK_END);
    ssize_t n;
    if (end < 0) return fail(j, "measure", e);
    do n = writev(j->fd, parts, 2);
    while (n < 0 && errno == EINTR);
    if (n >= 0 && (size_t)n != n_bytes + 1) return take_back(j, end, e);
    if (n < 0 || fdatasync(j->fd) != 0) return fail(j, "write", e);
    return ERR_NONE;
}

void journal_close(journal *j)
{
    if (!j) return;
    if (j->fd >= 0) close(j->fd);
    mem_free(j->text);
    mem_free(j->path);
    mem_free(j);
}
