/* process: a program that runs beside this one; what it prints is read through a pipe.
 *
 * It begins a session and a process group of its own, without a terminal, with /dev/null as its
 * input, both outputs in one pipe, no other descriptor of this process, and signals as a new
 * program expects them. What it leaves running in its group is killed when it ends: nobody would
 * read that output. What it has started and has left the group is not looked for: once its parent
 * has ended it is nobody's child, and cannot be told from other programs. Used by one thread, but
 * for the list; nothing here waits but process_close. */
#ifndef BASE_PROCESS_H
#define BASE_PROCESS_H

#include <stdatomic.h>
#include <stddef.h>

#include "base/err.h"

typedef struct process process;

/* The groups of programs that run: a signal from the terminal does not reach them, so whoever ends
 * this process at a signal ends them first. All zero: none. */
enum { PROCESS_LISTED = 256 };
typedef struct process_list {
    atomic_int group[PROCESS_LISTED]; /* 0: a free place */
} process_list;

/* Starts argv[0], which is looked for in PATH, in the directory cwd. argv ends with NULL. The
 * program stands in `list`, which outlives it, while it runs. */
process *process_open(const char *const *argv, const char *cwd, process_list *list, err_info *e);

/* Readable while there is output, and once the program has ended. */
int process_fd(const process *p);

/* Up to `cap` bytes of output into out; 0 when there are none now. */
size_t process_read(process *p, void *out, size_t cap);

typedef struct process_end {
    int code;   /* what it exited with, -1 when a signal ended it */
    int signal; /* which, 0 when it exited */
} process_end;

/* True once it has ended. Output that it wrote before is then there to be read. */
int process_is_done(process *p, process_end *end);

/* Sends a signal to the whole group, while the program runs. */
void process_signal(process *p, int number);

/* Kills what still runs, and waits for the program's end. NULL is fine. */
void process_close(process *p);

/* Kills every group that is listed, whatever goes on meanwhile: for signal handlers. */
void process_kill_listed(process_list *list);

#endif
