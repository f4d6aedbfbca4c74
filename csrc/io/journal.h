/* journal: a file of lines that outlives the process that writes it.
 *
 * Whoever has it open holds a lock on it, which the system takes back when the process ends, in
 * whatever way. A line is on the disk when journal_append returns. A last line that a power cut
 * left unfinished does not count, and the first append cuts it off. One thread at a time. */
#ifndef IO_JOURNAL_H
#define IO_JOURNAL_H

#include <stddef.h>

#include "base/err.h"

typedef struct journal journal;

/* A new file; one that is there is ERR_IO. */
journal *journal_create(const char *path, err_info *e);

/* One that is there; ERR_BUSY while another process has it open. */
journal *journal_open(const char *path, err_info *e);

/* The lines that were there when it was opened, each with its newline; valid until it is closed. */
const char *journal_text(const journal *j, size_t *n_bytes);

/* What is behind the lines: the beginning of one, if it is a journal. */
const char *journal_tail(const journal *j, size_t *n_bytes);

/* `line` has no newline. */
err_code journal_append(journal *j, const char *line, size_t n_bytes, err_info *e);

/* Lets the file go; it stays. */
void journal_close(journal *j);

#endif
