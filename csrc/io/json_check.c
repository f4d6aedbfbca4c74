#include "io/json_check.h"

#include <string.h>

#include "base/utf8.h"

typedef struct scanner {
    const uint8_t *begin, *p, *end;
    const char *name;
    err_info *e;
    json_facts *facts;
} scanner;

static err_code fail(const scanner *s, const uint8_t *at, const char *what)
{
    return err_set(s->e, ERR_FORMAT, "%s: byte %zu: %s", s->name, (size_t)(at - s->begin), what);
}

static err_code fail_here(const scanner *s, const char *what)
{
    return fail(s, s->p, s->p == s->end ? "unexpected end of JSON text" : what);
}

static void skip_space(scanner *s)
{
    while (s->p < s->end && (*s->p == ' ' || *s->p == '\n' || *s->p == '\t' || *s->p == '\r'))
        s->p++;
}

static int is_digit(const scanner *s)
{
    return s->p < s->end && *s->p >= '0' && *s->p <= '9';
}

/* A string or number has been read since `from`. */
static void note_leaf(const scanner *s, const uint8_t *from)
{
    size_t n = (size_t)(s->p - from);
    if (n > s->facts->longest_leaf) s->facts->longest_leaf = n;
}

int json_escape_value(const uint8_t *p, const uint8_t *end)
{
    int v = 0;
    if (end - p < 6 || p[0] != '\\' || p[1] != 'u') return -1;
    for (int i = 2; i < 6; i++) {
        uint8_t c = p[i];
        int d = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
        if (d < 0) return -1;
        v = v * 16 + d;
    }
    return v;
}

static err_code check_escape(scanner *s, int is_key)
{
    const uint8_t *at = s->p++;
    if (s->p == s->end) return fail_here(s, "");
    uint8_t c = *s->p++;
    if (c != 'u')
        return c && strchr("\"\\/bfnrt", c) ? ERR_NONE : fail(s, at, "invalid escape in string");
    int v = json_escape_value(at, s->end);
    if (v < 0) return fail(s, at, "\\u without four hexadecimal digits");
    /* json-c keeps keys as C strings and would cut this one short. */
    if (v == 0 && is_key) return fail(s, at, "U+0000 in an object key");
    s->p = at + 6;
    return ERR_NONE;
}

static err_code check_string(scanner *s, int is_key)
{
    const uint8_t *open = s->p++;
    for (;;) {
        while (s->p < s->end && *s->p >= 0x20 && *s->p < 0x80 && *s->p != '"' && *s->p != '\\')
            s->p++;
        if (s->p == s->end) return fail(s, open, "string is not closed");
        uint8_t c = *s->p;
        if (c == '"') {
            s->p++;
            note_leaf(s, open);
            return ERR_NONE;
        }
        if (c < 0x20) return fail(s, s->p, "raw control character in string");
        if (c == '\\') {
            err_code code = check_escape(s, is_key);
            if (code) return code;
        } else {
            size_t n;
            if (utf8_next((const char *)s->p, (size_t)(s->end - s->p), &n) != UTF8_WHOLE)
                return fail(s, s->p, "invalid UTF-8");
            s->p += n;
        }
    }
}

static err_code check_number(scanner *s)
{
    const uint8_t *begin = s->p;
    s->p += *s->p == '-';
    const uint8_t *digits = s->p;
    if (!is_digit(s)) return fail_here(s, "digit expected");
    if (*s->p == '0')
        s->p++;
    else
        while (is_digit(s)) s->p++;
    if (is_digit(s)) return fail(s, digits, "number with a leading zero");
    if (s->p < s->end && *s->p == '.') {
        s->p++;
        if (!is_digit(s)) return fail_here(s, "digit expected after the point");
        while (is_digit(s)) s->p++;
    }
    if (s->p < s->end && (*s->p == 'e' || *s->p == 'E')) {
        s->p++;
        if (s->p < s->end && (*s->p == '+' || *s->p == '-')) s->p++;
        if (!is_digit(s)) return fail_here(s, "digit expected in the exponent");
        while (is_digit(s)) s->p++;
    }
    note_leaf(s, begin);
    return ERR_NONE;
}

static err_code check_word(scanner *s, const char *word)
{
    size_t n = strlen(word);
    if ((size_t)(s->end - s->p) < n || memcmp(s->p, word, n) != 0)
        return fail(s, s->p, "value expected");
    s->p += n;
    return ERR_NONE;
}

/* Anything but '{' and '['. */
static err_code check_leaf(scanner *s)
{
    switch (*s->p) {
    case '"': return check_string(s, 0);
    case 't': return check_word(s, "true");
    case 'f': return check_word(s, "false");
    case 'n': return check_word(s, "null");
    default: break;
    }
    if (*s->p == '-' || is_digit(s)) return check_number(s);
    return fail(s, s->p, "value expected");
}

/* `"key" :` and the space behind it. */
static err_code check_key(scanner *s)
{
    if (s->p == s->end || *s->p != '"') return fail_here(s, "key in double quotes expected");
    err_code code = check_string(s, 1);
    if (code) return code;
    skip_space(s);
    if (s->p == s->end || *s->p != ':') return fail_here(s, "':' expected");
    s->p++;
    skip_space(s);
    return ERR_NONE;
}

/* Behind a complete value: closes what ends here and moves to the next value, if there is one. */
static err_code check_next(scanner *s, const char *closers, int *depth)
{
    while (*depth > 0) {
        skip_space(s);
        if (s->p == s->end) return fail_here(s, "");
        char closer = closers[*depth - 1];
        if (*s->p == (uint8_t)closer) {
            s->p++;
            --*depth;
            continue;
        }
        if (*s->p != ',')
            return fail(s, s->p, closer == '}' ? "',' or '}' expected" : "',' or ']' expected");
        s->p++;
        skip_space(s);
        return closer == '}' ? check_key(s) : ERR_NONE;
    }
    return ERR_NONE;
}

/* One value with everything inside it; an explicit stack, so that nesting costs one byte. */
static err_code check_value(scanner *s, int max_depth, size_t max_values)
{
    char closers[JSON_MAX_DEPTH];
    int depth = 0;
    size_t n_values = 0;
    do {
        err_code code;
        if (s->p == s->end) return fail_here(s, "");
        size_t counts = (*s->p == '{' || *s->p == '[') + (depth > 0 && closers[depth - 1] == '}');
        counts = 1 + counts * (JSON_COUNTS_AS - 1);
        if (counts > max_values - n_values)
            return err_set(s->e, ERR_LIMIT,
                           "%s: byte %zu: more than %zu values, where lists, objects and members "
                           "count as %d",
                           s->name, (size_t)(s->p - s->begin), max_values, JSON_COUNTS_AS);
        n_values += counts;
        if (*s->p == '{' || *s->p == '[') {
            if (depth == max_depth)
                return err_set(s->e, ERR_LIMIT, "%s: byte %zu: nested deeper than %d levels",
                               s->name, (size_t)(s->p - s->begin), max_depth);
            char closer = *s->p++ == '{' ? '}' : ']';
            closers[depth++] = closer;
            skip_space(s);
            if (s->p < s->end && *s->p == (uint8_t)closer) {
                s->p++;
                depth--;
            } else {
                if (closer == '}' && (code = check_key(s)) != ERR_NONE) return code;
                continue;
            }
        } else if ((code = check_leaf(s)) != ERR_NONE) {
            return code;
        }
        if ((code = check_next(s, closers, &depth)) != ERR_NONE) return code;
    } while (depth > 0);
    return ERR_NONE;
}

err_code json_check(const char *text, size_t n_bytes, const char *name, int max_depth,
                    size_t max_values, json_facts *facts, err_info *e)
{
    const uint8_t *begin = (const uint8_t *)text;
    scanner s = {begin, begin, begin + n_bytes, name, e, facts};
    *facts = (json_facts){0};
    if (max_depth < 1 || max_depth > JSON_MAX_DEPTH)
        return err_set(e, ERR_RANGE, "%s: nesting limit %d is not between 1 and %d", name,
                       max_depth, JSON_MAX_DEPTH);
    skip_space(&s);
    facts->begin = (size_t)(s.p - begin);
    err_code code = check_value(&s, max_depth, max_values);
    if (code) return code;
    skip_space(&s);
    return s.p < s.end ? fail(&s, s.p, "text behind the JSON value") : ERR_NONE;
}
