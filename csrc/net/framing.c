/* framing: requests that are wrong by their sizes or lines, seen before libevent reads them. */
#include "net/framing.h"

#include <event2/util.h>
#include <stdlib.h>
#include <string.h>

enum { SIZE_LINE = 1024 }; /* bytes of a chunk's size and extensions; more are an attack */

static int is_field(const char *line, const char *name)
{
    size_t n = strlen(name);
    return evutil_ascii_strncasecmp(line, name, n) == 0 && line[n] == ':';
}

static const char *value_of(const char *line)
{
    return strchr(line, ':') + 1;
}

/* What is malformed here libevent refuses, and what contradicts itself net_on_request. */
static int end_head_line(net_framing *f, uint64_t body_bytes)
{
    if (f->line[0] == '\0') { /* to libevent also a line that begins with such a byte */
        if (!f->is_chunked && f->body > body_bytes) return 413;
        f->in = f->is_chunked ? NET_IN_SIZE : NET_IN_REST;
        f->body = 0;
    } else if (is_field(f->line, "Content-Length")) {
        const char *value = value_of(f->line);
        if (*value >= '0' && *value <= '9') f->body = strtoull(value, NULL, 10);
    } else if (is_field(f->line, "Transfer-Encoding")) {
        const char *value = value_of(f->line);
        size_t n = strcspn(value, " \t");
        if (n == 7 && evutil_ascii_strncasecmp(value, "chunked", n) == 0) f->is_chunked = 1;
    }
    return 0;
}

static int end_size_line(net_framing *f, uint64_t body_bytes)
{
    size_t n_digits = strspn(f->line, "0123456789abcdefABCDEF");
    if (n_digits == 0 || !strchr(" ", f->line[n_digits])) return 400;
    uint64_t size = strtoull(f->line, NULL, 16); /* at most ULLONG_MAX */
    if (n_digits > 16 || size > body_bytes - f->body) return 413;
    f->body += size;
    f->left = size;
    f->in = size ? NET_IN_CHUNK : NET_IN_REST;
    return 0;
}

static int end_line(net_framing *f, uint64_t body_bytes)
{
    size_t n_kept = f->n_line < sizeof f->line ? f->n_line : sizeof f->line - 1;
    if (n_kept > 0 && f->line[n_kept - 1] == '\r') {
        n_kept--;
        f->n_line--;
    }
    f->line[n_kept] = '\0';
    int status = 0;
    if (f->in == NET_IN_HEAD)
        status = end_head_line(f, body_bytes);
    else if (f->in == NET_IN_SIZE)
        status = end_size_line(f, body_bytes);
    else
        f->in = NET_IN_SIZE;
    f->n_line = 0;
    return status;
}

/* What others may take for the end of a line, or pass over as one: around chunks lines end in CRLF,
 * and nothing else is behind the bytes of one (RFC 9112, 7.1). */
static int is_misplaced(const net_framing *f, char c)
{
    if (f->in == NET_IN_HEAD) return 0;
    return f->is_cr != (c == '\n') || (f->in == NET_IN_END && c != '\r' && c != '\n');
}

/* A line that goes on with the field of the line before, as libevent reads it; what fields mean is
 * to be seen in one line (RFC 9112, 5.2). */
static int is_folded(const net_framing *f, char c)
{
    return f->in == NET_IN_HEAD && f->n_line == 0 && (c == ' ' || c == '\t');
}

/* Blanks before a value, however many, take no room from it. */
static int is_padding(const net_framing *f, char c)
{
    int is_behind = f->n_line > 0 && f->n_line < sizeof f->line && f->line[f->n_line - 1] == ':';
    return f->in == NET_IN_HEAD && (c == ' ' || c == '\t') && is_behind;
}

/* Of extensions libevent 2.1 knows nothing, but it passes over what stands behind a space. */
static int is_extension(const net_framing *f, char c)
{
    return f->in == NET_IN_SIZE && (c == ';' || c == '\t');
}

int net_follow(net_framing *f, uint64_t body_bytes, char *bytes, size_t n_bytes)
{
    size_t at = 0;
    while (at < n_bytes && f->in != NET_IN_REST) {
        if (f->in == NET_IN_CHUNK) {
            size_t there = n_bytes - at;
            size_t step = f->left < there ? (size_t)f->left : there;
            at += step;
            f->left -= step;
            if (f->left == 0) f->in = NET_IN_END;
            continue;
        }
        char *c = bytes + at++;
        if (is_misplaced(f, *c) || is_folded(f, *c)) return 400;
        f->is_cr = *c == '\r';
        if (*c == '\n') {
            int status = end_line(f, body_bytes);
            if (status) return status;
            continue;
        }
        if (is_padding(f, *c)) continue;
        if (is_extension(f, *c)) *c = ' ';
        if (f->n_line < sizeof f->line - 1) f->line[f->n_line] = *c;
        f->n_line++;
        if (f->in == NET_IN_SIZE && f->n_line > SIZE_LINE) return 400;
    }
    return 0;
}
