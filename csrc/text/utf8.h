/* utf8: well-formedness, repair and NFC.
 *
 * Broken input becomes one U+FFFD for each maximal broken subpart (Unicode 15, section 3.9, "U+FFFD
 * Substitution of Maximal Subparts"), as WHATWG decoders and Python's errors="replace" do. */
#ifndef TEXT_UTF8_H
#define TEXT_UTF8_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "text/buf.h"

typedef enum utf8_kind {
    UTF8_WHOLE,  /* a character */
    UTF8_BROKEN, /* bytes that no continuation can mend */
    UTF8_CUT,    /* the text ends inside what may become a character */
} utf8_kind;

/* What s[n] (n >= 1) begins with, and how many bytes of it. */
utf8_kind utf8_next(const char *s, size_t n, size_t *len);

/* Bytes of s[n] that are well formed, from the start. */
size_t utf8_valid(const char *s, size_t n);

/* Appends s[n] with U+FFFD for what is broken. A cut end is replaced as well, unless `held` is
 * given: then those bytes (at most 3, the last of s) are left out and counted there. */
err_code utf8_repair(const char *s, size_t n, buf *out, size_t *held, err_info *e);

/* Puts the NFC form of the valid text s[n] into *out (replacing what it held) and sets *changed,
 * or leaves *out alone and clears *changed when the text holds nothing that NFC could change. */
err_code utf8_nfc(const char *s, size_t n, buf *out, int *changed, err_info *e);

#endif
