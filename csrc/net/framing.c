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
    if (f->line[0] == '\0') {
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
    f->in = size ? NET_IN_CHUNK : NET_IN_TRAILER;
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
    else if (f->in == NET_IN_END)
        f->in = NET_IN_SIZE;
    else if (f->line[0] == '\0')
        f->in = NET_IN_REST;
    f->n_line = 0;
    return status;
}

/* What others may take for the end of a line, or pass over as one: a CR with something else behind
 * it than an LF (RFC 9112, 2.2); NULs, which end lines for libevent. Around chunks lines end in
 * CRLF, and nothing else is behind the bytes of one (7.1). */
static int is_misplaced(const net_framing *f, char c)
{
    int ends = c == '\n';
    if (c == '\0' || (f->is_cr && !ends)) return 1;
    if (net_is_among_fields(f)) return 0;
    return (ends && !f->is_cr) || (f->in == NET_IN_END && c != '\r' && !ends);
}

/* A line that goes on with the field of the line before, as libevent reads it; what fields mean is
 * to be seen in one line (RFC 9112, 5.2). */
static int is_folded(const net_framing *f, char c)
{
    return net_is_among_fields(f) && f->n_line == 0 && (c == ' ' || c == '\t');
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

int net_is_among_fields(const net_framing *f)
{
    return f->in == NET_IN_HEAD || f->in == NET_IN_TRAILER;
}

int net_empty_line(const char *bytes, size_t n_bytes)
{
    if (n_bytes == 0 || (n_bytes == 1 && bytes[0] == '\r')) return -1;
    if (bytes[0] == '\n') return 1;
    return bytes[0] == '\r' && bytes[1] == '\n' ? 2 : 0;
}

int net_follow(net_framing *f, uint64_t body_bytes, char *bytes, size_t n_bytes)
{
    size_t at = 0;
    f->has_begun = 1;
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
