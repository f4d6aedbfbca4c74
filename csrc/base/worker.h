/* worker: one thread that runs one task at a time in the background.
 *
 * For long computations beside an event loop: the thread that starts a task goes on, and a
 * descriptor that an event loop can wait for becomes readable when the task is done. Used by one
 * thread. */
#ifndef BASE_WORKER_H
#define BASE_WORKER_H

#include "base/err.h"

typedef struct worker worker;

worker *worker_open(err_info *e);
/* Waits for the task. NULL is fine. */
void worker_close(worker *w);

/* Runs fn(ctx) in the background. No task may be running. */
void worker_start(worker *w, void (*fn)(void *ctx), void *ctx);
/* False while a task is running; clears the descriptor when it is not. */
int worker_is_idle(worker *w);
/* Returns when no task is running; the descriptor still tells of the end. */
void worker_wait(worker *w);
/* Readable once a task is done, until worker_is_idle has told or the next one starts. */
int worker_fd(const worker *w);

#endif
