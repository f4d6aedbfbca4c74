/* err: how the C core reports that the world failed.
 *
 * Every fallible function takes an `err_info *` as its last argument, returns a non-zero code
 * (or NULL) on failure and leaves one line of text that names the file, tensor or byte. Nothing
 * in the core prints, exits, aborts on input or jumps. Pure; safe from any thread. */
#ifndef BASE_ERR_H
#define BASE_ERR_H

typedef enum err_code {
    ERR_NONE = 0,
    ERR_IO,          /* the operating system said no: open, read, write, disk full */
    ERR_FORMAT,      /* bytes that do not mean what they should */
    ERR_MEMORY,      /* allocation failed */
    ERR_LIMIT,       /* a named limit was reached: context length, nesting, ... */
    ERR_RANGE,       /* a value outside its range: token id, shape, ... */
    ERR_CANCELLED,   /* the caller asked to stop */
    ERR_UNSUPPORTED, /* well formed, but not something moonlet reads or does */
    ERR_BUSY,        /* another process holds it */
} err_code;

typedef struct err_info {
    err_code code;
    char text[512];
} err_info;

/* Fills *e and returns `code`, so that a function can `return err_set(e, ERR_IO, ...)`.
 * Text that does not fit is cut. `e` may be NULL. */
err_code err_set(err_info *e, err_code code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Puts "prefix: " before the text already there (which file, which tensor); returns e->code. */
err_code err_prefix(err_info *e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* "io", "format", ...: the third value that Lua callers get. */
const char *err_name(err_code code);

#endif
