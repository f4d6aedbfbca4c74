#include "text/unicode.h"

#include <string.h>

#include "base/utf8.h"

/* Half a UTF-16 surrogate, of which only the third byte is missing: broken already, but CPython's
 * incremental decoder (Objects/unicodeobject.c, "Truncated surrogate code") waits for that byte,
 * and streams are defined by it. */
static int is_cut_surrogate(const char *s, size_t n)
{
    return n == 2 && (uint8_t)s[0] == 0xed && (uint8_t)s[1] >= 0xa0 && (uint8_t)s[1] <= 0xbf;
}

err_code unicode_repair(const char *s, size_t n, buf *out, size_t *held, err_info *e)
{
    err_code c = ERR_NONE;
    if (held) *held = 0;
    while (n && !c) {
        size_t ok = utf8_valid(s, n), len = 0;
        c = buf_append(out, s, ok, e);
        s += ok;
        n -= ok;
        if (!n || c) break;
        utf8_kind kind = utf8_next(s, n, &len);
        if (held && (kind == UTF8_CUT || is_cut_surrogate(s, n)))
            *held = len = n;
        else
            c = buf_append(out, "\xef\xbf\xbd", 3, e);
        s += len;
        n -= len;
    }
    return c;
}
