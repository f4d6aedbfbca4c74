/* utf8: what is a character and what is not (Unicode 15, section 3.9). Pure. */
#ifndef BASE_UTF8_H
#define BASE_UTF8_H

#include <stddef.h>

typedef enum utf8_kind {
    UTF8_WHOLE,  /* a character */
    UTF8_BROKEN, /* bytes that no continuation can mend */
    UTF8_CUT,    /* the text ends inside what may become a character */
} utf8_kind;

/* What s[n] (n >= 1) begins with, and how many bytes of it. */
utf8_kind utf8_next(const char *s, size_t n, size_t *len);

/* Bytes of s[n] that are well formed, from the start. */
size_t utf8_valid(const char *s, size_t n);

#endif
