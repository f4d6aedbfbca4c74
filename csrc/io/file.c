#include "io/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static err_code fail(const char *path, const char *what, err_info *e)
{
    return err_set(e, ERR_IO, "%s: cannot %s: %s", path, what, strerror(errno));
}

static int write_all(int fd, const char *data, size_t n)
{
    while (n > 0) {
        ssize_t done = write(fd, data, n);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return -1;
        data += done;
        n -= (size_t)done;
    }
    return 0;
}

static err_code refuse(const char *partial, err_info *e)
{
    int fd = open(partial, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    int is_busy = fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    if (fd >= 0) close(fd);
    if (is_busy) return err_set(e, ERR_BUSY, "%s: another run is writing it", partial);
    return err_set(e, ERR_IO, "%s: exists, left by a run that died or of another origin; remove it",
                   partial);
}

int file_claim(const char *partial, err_info *e)
{
    int fd = open(partial, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    /* The lock only lets others say why the name is taken, so one that fails does no harm. */
    if (fd >= 0) return (void)flock(fd, LOCK_EX | LOCK_NB), fd;
    if (errno == EEXIST)
        refuse(partial, e);
    else
        err_set(e, ERR_IO, "%s: %s", partial, strerror(errno));
    return -1;
}

static int is_claimed(int fd, const char *partial)
{
    struct stat ours, there;
    return fstat(fd, &ours) == 0 && lstat(partial, &there) == 0 && ours.st_dev == there.st_dev &&
           ours.st_ino == there.st_ino;
}

err_code file_settle(int fd, const char *partial, const char *path, err_info *e)
{
    if (fsync(fd) != 0) return fail(partial, "sync", e);
    if (!is_claimed(fd, partial))
        return err_set(e, ERR_IO, "%s: is not the file that was written there", partial);
    return rename(partial, path) == 0 ? ERR_NONE : fail(path, "replace", e);
}

void file_unclaim(int fd, const char *partial)
{
    if (is_claimed(fd, partial)) unlink(partial);
    close(fd);
}

err_code file_reserve(const char *path, int64_t n_bytes, err_info *e)
{
    int fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666);
    if (fd < 0) return fail(path, "create", e);
    int error;
    do error = posix_fallocate(fd, 0, n_bytes);
    while (error == EINTR);
    close(fd);
    if (!error) return ERR_NONE;
    return err_set(e, ERR_IO, "%s: cannot reserve %lld bytes: %s", path, (long long)n_bytes,
                   strerror(error));
}

/* ---- where results go ------------------------------------------------------------------- */

static err_code path_too_long(const char *path, err_info *e)
{
    return err_set(e, ERR_IO, "%.255s...: path too long", path);
}

static err_code partial_name(const char *path, char out[PATH_MAX], err_info *e)
{
    int n = snprintf(out, PATH_MAX, "%s.partial", path);
    return n >= 0 && n < PATH_MAX ? ERR_NONE : path_too_long(path, e);
}

static int lies_in(const char *dir, const char *parent)
{
    size_t n = strlen(parent);
    return strncmp(dir, parent, n) == 0 && (dir[n] == '/' || !dir[n]);
}

static err_code not_a_file(const char *shown, err_info *e)
{
    return err_set(e, ERR_IO, "%s: is not a regular file; results are written to files only",
                   shown);
}

/* The absolute path of what `path` names, a link or nothing perhaps. What the system shows as files
 * (proc(5): /proc/self/fd/1 is wherever standard output goes) has names that must stay. */
static err_code locate(const char *shown, const char *path, char out[PATH_MAX], err_info *e)
{
    char parent[PATH_MAX], dir[PATH_MAX];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    size_t n = slash ? (size_t)(slash - path) + (slash == path) : 1;
    if (n >= sizeof parent) return path_too_long(shown, e);
    memcpy(parent, slash ? path : ".", n);
    parent[n] = 0;
    if (!realpath(parent, dir))
        return err_set(e, ERR_IO, "%s: %s: cannot find: %s", shown, parent, strerror(errno));
    if (lies_in(dir, "/proc") || lies_in(dir, "/sys") ||
        (lies_in(dir, "/dev") && !lies_in(dir, "/dev/shm")))
        return not_a_file(shown, e);
    int length = snprintf(out, PATH_MAX, "%s/%s", strcmp(dir, "/") == 0 ? "" : dir, name);
    return length >= 0 && length < PATH_MAX ? ERR_NONE : path_too_long(shown, e);
}

/* Replaces the link at `at` by what it says, which may be a link, too. */
static err_code follow(const char *shown, char at[PATH_MAX], err_info *e)
{
    char text[PATH_MAX], joined[PATH_MAX];
    ssize_t n = readlink(at, text, sizeof text - 1);
    if (n < 0) return fail(shown, "read the link", e);
    text[n] = 0;
    int dir = text[0] == '/' ? 0 : (int)(strrchr(at, '/') - at) + 1;
    int length = snprintf(joined, sizeof joined, "%.*s%s", dir, at, text);
    if (length < 0 || (size_t)length >= sizeof joined) return path_too_long(shown, e);
    return file_what(joined) == FILE_NONE ? not_a_file(shown, e) : locate(shown, joined, at, e);
}

err_code file_target(const char *path, char out[PATH_MAX], err_info *e)
{
    enum { LINKS = 40 }; /* as many as the system follows: path_resolution(7) */
    size_t n = strlen(path);
    if (n && path[n - 1] == '/') return err_set(e, ERR_IO, "%s: Is a directory", path);
    err_code code = locate(path, path, out, e);
    file_kind kind = code ? FILE_NONE : file_what(out);
    int is_given = kind != FILE_LINK;
    for (int i = 0; i < LINKS && !code && kind == FILE_LINK; i++) {
        code = follow(path, out, e);
        kind = code ? FILE_NONE : file_what(out);
    }
    if (code) return code;
    if (kind == FILE_DIRECTORY) return err_set(e, ERR_IO, "%s: Is a directory", path);
    if (kind != FILE_NONE && kind != FILE_REGULAR) return not_a_file(path, e);
    if (!is_given) return ERR_NONE;
    if (n >= PATH_MAX) return path_too_long(path, e);
    memcpy(out, path, n + 1); /* messages show it as it was given */
    return ERR_NONE;
}

err_code file_check_free(const char *path, err_info *e)
{
    char target[PATH_MAX], partial[PATH_MAX];
    if (file_target(path, target, e) || partial_name(target, partial, e)) return ERR_IO;
    return file_what(partial) == FILE_NONE ? ERR_NONE : refuse(partial, e);
}

err_code file_out_open(file_out *out, const char *path, err_info *e)
{
    out->fd = -1;
    if (file_target(path, out->path, e) || partial_name(out->path, out->partial, e)) return ERR_IO;
    out->fd = file_claim(out->partial, e);
    if (out->fd >= 0) return ERR_NONE;
    return e ? e->code : ERR_IO;
}

err_code file_out_put(file_out *out, const void *data, size_t n_bytes, err_info *e)
{
    return write_all(out->fd, data, n_bytes) == 0 ? ERR_NONE : fail(out->path, "write", e);
}

err_code file_out_finish(file_out *out, err_info *e)
{
    err_code code = file_settle(out->fd, out->partial, out->path, e);
    file_out_abort(out);
    return code;
}

void file_out_abort(file_out *out)
{
    if (out->fd < 0) return;
    file_unclaim(out->fd, out->partial);
    out->fd = -1;
}

err_code file_write(const char *path, const void *data, size_t n_bytes, err_info *e)
{
    file_out out;
    err_code code = file_out_open(&out, path, e);
    if (code) return code;
    struct stat old;
    int failed =
        stat(path, &old) == 0 && S_ISREG(old.st_mode) && fchmod(out.fd, old.st_mode & 07777) != 0;
    if (failed) fail(path, "set the permissions of", e);
    if (failed || file_out_put(&out, data, n_bytes, e)) {
        file_out_abort(&out);
        return ERR_IO;
    }
    return file_out_finish(&out, e);
}

err_code file_make_dir(const char *path, err_info *e)
{
    return mkdir(path, 0777) == 0 ? ERR_NONE : fail(path, "create the directory", e);
}

err_code file_sync_dir(const char *path, err_info *e)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return fail(path, "open the directory", e);
    /* Some file systems cannot sync directories and say so with EINVAL; nothing is lost then. */
    err_code code = fsync(fd) == 0 || errno == EINVAL ? ERR_NONE : fail(path, "sync", e);
    close(fd);
    return code;
}

static int is_regular(DIR *dir, const char *name)
{
    struct stat st;
    return fstatat(dirfd(dir), name, &st, 0) == 0 && S_ISREG(st.st_mode);
}

err_code file_list(const char *path, int (*fn)(void *ctx, const char *name, int is_file), void *ctx,
                   err_info *e)
{
    DIR *dir = opendir(path);
    if (!dir) return fail(path, "list", e);
    err_code code = ERR_NONE;
    for (;;) {
        errno = 0;
        struct dirent *entry = readdir(dir);
        if (!entry) {
            if (errno) code = fail(path, "list", e);
            break;
        }
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) continue;
        if (fn(ctx, name, is_regular(dir, name))) {
            code = ERR_CANCELLED;
            break;
        }
    }
    closedir(dir);
    return code;
}

err_code file_check_writable(const char *path, err_info *e)
{
    return access(path, W_OK | X_OK) == 0 ? ERR_NONE : fail(path, "write in", e);
}

int64_t file_free_bytes(const char *path, err_info *e)
{
    struct statvfs fs;
    int64_t bytes;
    if (statvfs(path, &fs) != 0) {
        fail(path, "measure the free space of", e);
        return -1;
    }
    return __builtin_mul_overflow(fs.f_bavail, fs.f_frsize, &bytes) ? INT64_MAX : bytes;
}

file_kind file_what(const char *path)
{
    struct stat st;
    if (lstat(path, &st) != 0) return FILE_NONE;
    if (S_ISREG(st.st_mode)) return FILE_REGULAR;
    if (S_ISDIR(st.st_mode)) return FILE_DIRECTORY;
    return S_ISLNK(st.st_mode) ? FILE_LINK : FILE_OTHER;
}

err_code file_info(const char *path, int64_t *n_bytes, int64_t *changed_ns, err_info *e)
{
    struct stat st;
    if (stat(path, &st) != 0) return fail(path, "find", e);
    *n_bytes = (int64_t)st.st_size;
    *changed_ns = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
    return ERR_NONE;
}

err_code file_real_path(const char *path, char out[PATH_MAX], err_info *e)
{
    return realpath(path, out) ? ERR_NONE : fail(path, "find", e);
}
