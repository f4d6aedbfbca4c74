/* unicode: broken UTF-8 made whole, and NFC.
 *
 * Broken input becomes one U+FFFD for each maximal broken subpart (Unicode 15, section 3.9, "U+FFFD
 * Substitution of Maximal Subparts"), as WHATWG decoders and Python's errors="replace" do. */
#ifndef TEXT_UNICODE_H
#define TEXT_UNICODE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "text/buf.h"

/* Appends s[n] with U+FFFD for what is broken. A cut end is replaced as well, unless `held` is
 * given: then those bytes (at most 3, the last of s) are left out and counted there. */
err_code unicode_repair(const char *s, size_t n, buf *out, size_t *held, err_info *e);

/* Puts the NFC form of the valid text s[n] into *out (replacing what it held) and sets *changed,
 * or leaves *out alone and clears *changed when the text holds nothing that NFC could change. */
err_code unicode_nfc(const char *s, size_t n, buf *out, int *changed, err_info *e);

#endif
