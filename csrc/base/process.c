#include "base/process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/pidfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/mem.h"

struct process {
    pid_t pid;
    int output, pidfd, poll; /* descriptors, -1 when not open; poll has the other two in it */
    int is_done;
    process_end end;
    atomic_int *place; /* in the list */
};

/* A place that is nobody's until the program has its number. */
enum { TAKEN = -1 };

static atomic_int *take_place(process_list *list)
{
    for (int i = 0; i < PROCESS_LISTED; i++) {
        int none = 0;
        if (atomic_compare_exchange_strong(&list->group[i], &none, TAKEN)) return &list->group[i];
    }
    return NULL;
}

static void leave_place(process *p)
{
    if (p->place) atomic_store(p->place, 0);
    p->place = NULL;
}

void process_kill_listed(process_list *list)
{
    for (int i = 0; i < PROCESS_LISTED; i++) {
        int group = atomic_load(&list->group[i]);
        if (group > 0) kill(-group, SIGKILL);
    }
}

static void close_fd(int *fd)
{
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

/* All signals as they are by default, none blocked: an ignored one would stay ignored. */
static int set_attributes(posix_spawnattr_t *attr)
{
    sigset_t all, none;
    sigfillset(&all);
    sigdelset(&all, SIGKILL);
    sigdelset(&all, SIGSTOP);
    sigemptyset(&none);
    int error = posix_spawnattr_setsigdefault(attr, &all);
    if (!error) error = posix_spawnattr_setsigmask(attr, &none);
    if (error) return error;
    return posix_spawnattr_setflags(attr, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGDEF |
                                              POSIX_SPAWN_SETSIGMASK);
}

static int set_files(posix_spawn_file_actions_t *files, const char *cwd, int output)
{
    int error = posix_spawn_file_actions_addopen(files, 0, "/dev/null", O_RDONLY, 0);
    if (!error) error = posix_spawn_file_actions_adddup2(files, output, 1);
    if (!error) error = posix_spawn_file_actions_adddup2(files, output, 2);
    if (!error) error = posix_spawn_file_actions_addclosefrom_np(files, 3);
    if (!error) error = posix_spawn_file_actions_addchdir_np(files, cwd);
    return error;
}

static int spawn(pid_t *pid, const char *const *argv, const char *cwd, int output)
{
    posix_spawnattr_t attr;
    posix_spawn_file_actions_t files;
    int error = posix_spawnattr_init(&attr);
    if (error) return error;
    error = posix_spawn_file_actions_init(&files);
    if (!error) {
        error = set_attributes(&attr);
        if (!error) error = set_files(&files, cwd, output);
        /* The strings are copied into the new process; the interface is older than const. */
        if (!error) error = posix_spawnp(pid, argv[0], &files, &attr, (char *const *)argv, environ);
        posix_spawn_file_actions_destroy(&files);
    }
    posix_spawnattr_destroy(&attr);
    return error;
}

static int watch(process *p, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    return epoll_ctl(p->poll, EPOLL_CTL_ADD, fd, &event);
}

/* Everything that process_open opens; errno says what failed. */
static int start(process *p, const char *const *argv, const char *cwd)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return -1;
    p->output = ends[0];
    int error = spawn(&p->pid, argv, cwd, ends[1]);
    close(ends[1]);
    if (error) {
        p->pid = 0;
        errno = error;
        return -1;
    }
    atomic_store(p->place, (int)p->pid);
    if (fcntl(p->output, F_SETFL, O_NONBLOCK) != 0) return -1;
    p->pidfd = pidfd_open(p->pid, 0);
    p->poll = epoll_create1(EPOLL_CLOEXEC);
    if (p->pidfd < 0 || p->poll < 0) return -1;
    return watch(p, p->output) == 0 && watch(p, p->pidfd) == 0 ? 0 : -1;
}

process *process_open(const char *const *argv, const char *cwd, process_list *list, err_info *e)
{
    process *p = mem_array(1, sizeof *p, e);
    if (!p) return NULL;
    p->output = p->pidfd = p->poll = -1;
    p->place = take_place(list);
    if (!p->place) {
        err_set(e, ERR_LIMIT, "cannot run %s: %d programs run", argv[0], PROCESS_LISTED);
        process_close(p);
        return NULL;
    }
    if (start(p, argv, cwd) == 0) return p;
    err_set(e, ERR_IO, "cannot run %s in %s: %s", argv[0], cwd, strerror(errno));
    process_close(p);
    return NULL;
}

int process_fd(const process *p)
{
    return p->poll;
}

size_t process_read(process *p, void *out, size_t cap)
{
    if (p->output < 0 || cap == 0) return 0;
    ssize_t n;
    do n = read(p->output, out, cap);
    while (n < 0 && errno == EINTR);
    /* At its end the pipe would be readable for ever. */
    if (n == 0 || (n < 0 && errno != EAGAIN)) close_fd(&p->output);
    return n > 0 ? (size_t)n : 0;
}

/* Takes the end of the program, whose process is still a zombie: its number, which names the group,
 * belongs to nobody else until then. */
static void reap(process *p, int options)
{
    siginfo_t info = {0};
    int got;
    do got = waitid(P_PID, (id_t)p->pid, &info, WEXITED | WNOWAIT | options);
    while (got != 0 && errno == EINTR);
    if (got == 0 && info.si_pid == 0) return;
    int status = 0;
    p->is_done = 1;
    p->end = (process_end){.code = -1};
    if (got == 0) kill(-p->pid, SIGKILL);
    leave_place(p);
    if (got != 0) return; /* somebody else has taken it */
    if (waitpid(p->pid, &status, 0) != p->pid) return;
    if (WIFEXITED(status)) p->end.code = WEXITSTATUS(status);
    if (WIFSIGNALED(status)) p->end.signal = WTERMSIG(status);
}

int process_is_done(process *p, process_end *end)
{
    if (!p->is_done) reap(p, WNOHANG);
    *end = p->end;
    return p->is_done;
}

void process_signal(process *p, int number)
{
    if (!p->is_done) kill(-p->pid, number);
}

void process_close(process *p)
{
    if (!p) return;
    if (p->pid > 0 && !p->is_done) {
        kill(-p->pid, SIGKILL);
        reap(p, 0);
    }
    leave_place(p);
    close_fd(&p->poll);
    close_fd(&p->pidfd);
    close_fd(&p->output);
    mem_free(p);
}
