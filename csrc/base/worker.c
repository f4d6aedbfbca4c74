#include "base/worker.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/mem.h"

struct worker {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    void (*fn)(void *ctx); /* NULL: nothing to do */
    void *ctx;
    int is_closing;
    int fd;
};

static void *run(void *arg)
{
    worker *w = arg;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (!w->fn && !w->is_closing) pthread_cond_wait(&w->changed, &w->lock);
        if (!w->fn) break;
        pthread_mutex_unlock(&w->lock);
        w->fn(w->ctx);
        pthread_mutex_lock(&w->lock);
        w->fn = NULL;
        pthread_cond_broadcast(&w->changed);
        uint64_t one = 1;
        while (write(w->fd, &one, sizeof one) < 0 && errno == EINTR) continue;
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

worker *worker_open(err_info *e)
{
    worker *w = mem_array(1, sizeof *w, e);
    if (!w) return NULL;
    w->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->fd < 0) {
        err_set(e, ERR_IO, "cannot open an event descriptor: %s", strerror(errno));
        mem_free(w);
        return NULL;
    }
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->changed, NULL);
    int error = pthread_create(&w->thread, NULL, run, w);
    if (error == 0) return w;
    err_set(e, ERR_MEMORY, "cannot start a thread: %s", strerror(error));
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
    close(w->fd);
    mem_free(w);
    return NULL;
}

void worker_close(worker *w)
{
    if (!w) return;
    pthread_mutex_lock(&w->lock);
    w->is_closing = 1;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
    close(w->fd);
    mem_free(w);
}

static void clear_fd(worker *w)
{
    uint64_t n;
    while (read(w->fd, &n, sizeof n) < 0 && errno == EINTR) continue;
}

void worker_start(worker *w, void (*fn)(void *ctx), void *ctx)
{
    pthread_mutex_lock(&w->lock);
    clear_fd(w);
    w->fn = fn;
    w->ctx = ctx;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

int worker_is_idle(worker *w)
{
    pthread_mutex_lock(&w->lock);
    int idle = !w->fn;
    if (idle) clear_fd(w);
    pthread_mutex_unlock(&w->lock);
    return idle;
}

void worker_wait(worker *w)
{
    pthread_mutex_lock(&w->lock);
    while (w->fn) pthread_cond_wait(&w->changed, &w->lock);
    pthread_mutex_unlock(&w->lock);
}

int worker_fd(const worker *w)
{
    return w->fd;
}
