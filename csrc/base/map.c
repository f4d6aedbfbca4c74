#include "base/map.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const uint8_t empty[1];

err_code map_open(map_file *m, const char *path, err_info *e)
{
    *m = (map_file){empty, 0};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return err_set(e, ERR_IO, "%s: %s", path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) != 0) {
        err_set(e, ERR_IO, "%s: %s", path, strerror(errno));
        close(fd);
        return ERR_IO;
    }
    if (!S_ISREG(st.st_mode)) {
        close(fd);
        return err_set(e, ERR_IO, "%s: not a regular file", path);
    }
    if (st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) {
            err_set(e, ERR_IO, "%s: cannot map: %s", path, strerror(errno));
            close(fd);
            return ERR_IO;
        }
        *m = (map_file){p, (size_t)st.st_size};
    }
    close(fd);
    return ERR_NONE;
}

void map_close(map_file *m)
{
    if (m->data != empty && m->data) munmap((void *)(uintptr_t)m->data, m->n_bytes);
    *m = (map_file){empty, 0};
}

void map_expect(const void *data, size_t n_bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)data / page * page;
    madvise((void *)begin, (uintptr_t)data + n_bytes - begin, MADV_WILLNEED);
}

void map_forget(const void *data, size_t n_bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)data + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)data + n_bytes) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

static err_code reserve(int fd, const char *name, size_t n_bytes, err_info *e)
{
    int why;
    do why = posix_fallocate(fd, 0, (off_t)n_bytes);
    while (why == EINTR);
    if (!why) return ERR_NONE;
    return err_set(e, ERR_IO, "%s: cannot reserve %zu bytes: %s", name, n_bytes, strerror(why));
}

/* The file has no name once this returns, so nothing has to be cleaned up. -1 with *e filled. */
static int open_nameless(const char *dir, size_t n_bytes, err_info *e)
{
    char path[4096];
    int n = snprintf(path, sizeof path, "%s/moonlet-XXXXXX", dir);
    if (n < 0 || (size_t)n >= sizeof path) {
        err_set(e, ERR_LIMIT, "%.100s...: path is longer than %zu bytes", dir, sizeof path);
        return -1;
    }
    int fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0) {
        err_set(e, ERR_IO, "%s: cannot make a scratch file: %s", dir, strerror(errno));
        return -1;
    }
    unlink(path);
    if (reserve(fd, dir, n_bytes, e)) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Closes fd. */
static void *map_shared(int fd, const char *name, size_t n_bytes, err_info *e)
{
    void *p = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
        err_set(e, ERR_IO, "%s: cannot map %zu bytes: %s", name, n_bytes, strerror(errno));
        p = NULL;
    }
    close(fd);
    return p;
}

void *map_scratch(const char *dir, size_t n_bytes, err_info *e)
{
    size_t size = n_bytes ? n_bytes : 1;
    int fd = open_nameless(dir, size, e);
    return fd < 0 ? NULL : map_shared(fd, dir, size, e);
}

static err_code check_size(int fd, const char *path, size_t n_bytes, err_info *e)
{
    struct stat st;
    if (fstat(fd, &st) != 0) return err_set(e, ERR_IO, "%s: %s", path, strerror(errno));
    if (S_ISREG(st.st_mode) && (uint64_t)st.st_size == n_bytes) return ERR_NONE;
    return err_set(e, ERR_FORMAT, "%s: has not the %zu bytes that it was left with", path, n_bytes);
}

void *map_kept(const char *path, size_t n_bytes, int is_new, err_info *e)
{
    int flags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | (is_new ? O_CREAT | O_TRUNC : O_NONBLOCK);
    int fd = open(path, flags, 0666);
    if (fd < 0) {
        err_set(e, ERR_IO, "%s: %s", path, strerror(errno));
        return NULL;
    }
    if (is_new ? reserve(fd, path, n_bytes, e) : check_size(fd, path, n_bytes, e)) {
        close(fd);
        return NULL;
    }
    return map_shared(fd, path, n_bytes, e);
}

err_code map_sync(const void *kept, size_t n_bytes, err_info *e)
{
    if (msync((void *)(uintptr_t)kept, n_bytes, MS_SYNC) == 0) return ERR_NONE;
    return err_set(e, ERR_IO, "cannot sync a mapped file: %s", strerror(errno));
}
