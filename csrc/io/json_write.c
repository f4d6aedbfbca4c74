#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"
#include "io/json.h"

static char *put_unit(char *out, unsigned unit)
{
    static const char hex[] = "0123456789abcdef";
    *out++ = '\\';
    *out++ = 'u';
    for (int shift = 12; shift >= 0; shift -= 4) *out++ = hex[unit >> shift & 15];
    return out;
}

static char *put_ascii(char *out, uint8_t c, int ascii)
{
    static const char escaped[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt";
    const char *at = c ? strchr(escaped, c) : NULL;
    if (at) {
        *out++ = '\\';
        *out++ = letters[at - escaped];
    } else if (c < 0x20 || (ascii && c == 0x7f)) {
        out = put_unit(out, c);
    } else {
        *out++ = (char)c;
    }
    return out;
}

static char *put_escaped(char *out, const uint8_t *p, int n)
{
    unsigned code = p[0] & (0xffu >> (n + 1));
    for (int i = 1; i < n; i++) code = code << 6 | (p[i] & 0x3fu);
    if (code < 0x10000) return put_unit(out, code);
    out = put_unit(out, 0xd800 + ((code - 0x10000) >> 10));
    return put_unit(out, 0xdc00 + ((code - 0x10000) & 0x3ff));
}

size_t json_quote(char *out, const char *s, size_t n_bytes, int ascii)
{
    static const char replacement[] = "\xef\xbf\xbd";
    char *begin = out;
    const uint8_t *p = (const uint8_t *)s, *end = p + n_bytes;
    *out++ = '"';
    while (p < end) {
        size_t n;
        int whole = utf8_next((const char *)p, (size_t)(end - p), &n) == UTF8_WHOLE;
        const uint8_t *from = whole ? p : (const uint8_t *)replacement;
        int width = whole ? (int)n : 3;
        if (width == 1) {
            out = put_ascii(out, *from, ascii);
        } else if (ascii) {
            out = put_escaped(out, from, width);
        } else {
            memcpy(out, from, (size_t)width);
            out += width;
        }
        p += n;
    }
    *out++ = '"';
    return (size_t)(out - begin);
}

/* The next larger number of as many digits; a carry out of the first never comes up for powers of
 * two. */
static void increment(char *text)
{
    char *c = strchr(text, 'e') - 1;
    for (; *c == '9'; c--) *c = '0';
    ++*c;
}

/* The shortest decimal digits that read back as |x|, and where the point goes: 0.DIGITS x
 * 10^*point. x is finite and not 0. */
static int shortest_digits(double x, char digits[20], int *point)
{
    char text[40];
    int n = 1;
    /* Any normal number's 15 digits are exact if so few are enough, and %e pads with zeros;
     * subnormal numbers have fewer bits. */
    if (fabs(x) >= 0x1p-1022) n = 15;
    for (;; n++) {
        snprintf(text, sizeof text, "%.*e", n - 1, fabs(x));
        if (n >= 17 || strtod(text, NULL) == fabs(x)) break;
        /* Below a power of two doubles lie twice as close: the nearest 16 digits may read back as
         * another one while the second nearest do not (2^-44 is 5.684341886080802e-14). */
        int power;
        if (n == 16 && frexp(fabs(x), &power) == 0.5) {
            increment(text);
            if (strtod(text, NULL) == fabs(x)) break;
        }
    }
    char *exponent = strchr(text, 'e');
    digits[0] = text[0];
    int n_digits = 1;
    for (char *c = text + 1; c < exponent; c++)
        if (*c >= '0' && *c <= '9') digits[n_digits++] = *c; /* whatever the locale's point is */
    while (n_digits > 1 && digits[n_digits - 1] == '0') n_digits--;
    *point = atoi(exponent + 1) + 1;
    return n_digits;
}

size_t json_float_text(char out[JSON_FLOAT_BYTES], double x)
{
    char digits[20], *p = out;
    int point = 1, n = 1;
    digits[0] = '0';
    if (x != 0) n = shortest_digits(x, digits, &point);
    if (signbit(x)) *p++ = '-';
    /* The thresholds of Python's float_repr_style "short", Objects/floatobject.c */
    int scientific = point <= -4 || point > 16;
    int before = scientific ? 1 : point; /* digits before the point */
    if (before <= 0) {
        *p++ = '0';
        *p++ = '.';
        for (int i = before; i < 0; i++) *p++ = '0';
        before = 0;
    }
    for (int i = 0; i < n || i < before; i++) {
        if (i == before && i > 0) *p++ = '.';
        *p++ = i < n ? digits[i] : '0';
    }
    if (!scientific && n <= before) {
        *p++ = '.';
        *p++ = '0';
    }
    *p = 0;
    if (scientific) p += snprintf(p, 8, "e%c%02d", point > 0 ? '+' : '-', abs(point - 1));
    return (size_t)(p - out);
}
