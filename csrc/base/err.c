#include "base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

err_code err_set(err_info *e, err_code code, const char *fmt, ...)
{
    if (e) {
        va_list args;
        va_start(args, fmt);
        vsnprintf(e->text, sizeof e->text, fmt, args);
        va_end(args);
        e->code = code;
    }
    return code;
}

err_code err_prefix(err_info *e, const char *fmt, ...)
{
    if (!e) return ERR_FORMAT;
    char old[sizeof e->text];
    memcpy(old, e->text, sizeof old);
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(e->text, sizeof e->text, fmt, args);
    va_end(args);
    size_t room = sizeof e->text - 1;
    if (n < 0 || (size_t)n + 2 > room) return e->code;
    char *end = e->text + n;
    room -= (size_t)n + 2;
    size_t len = strnlen(old, room);
    memcpy(end, ": ", 2);
    memcpy(end + 2, old, len);
    end[2 + len] = 0;
    return e->code;
}

const char *err_name(err_code code)
{
    static const char *const names[] = {"none",  "io",        "format",      "memory", "limit",
                                        "range", "cancelled", "unsupported", "busy"};
    return (unsigned)code < sizeof names / sizeof *names ? names[code] : "unknown";
}
