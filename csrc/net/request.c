/* request: one request and its reply. */
#include "net/net_impl.h"

#include <errno.h>
#include <event2/http_struct.h>
#include <event2/keyvalq_struct.h>
#include <event2/util.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "base/clock.h"
#include "base/mem.h"

static struct bufferevent *bev_of(const net_request *r)
{
    return evhttp_connection_get_bufferevent(evhttp_request_get_connection(r->req));
}

void net_drop_body(net_request *r)
{
    if (!r->req) return;
    struct evbuffer *body = evhttp_request_get_input_buffer(r->req);
    evbuffer_drain(body, evbuffer_get_length(body));
    net_connection *c = net_connection_of(r->net, bev_of(r));
    if (c) net_count(c, evbuffer_get_length(bufferevent_get_input(c->bev)));
}

/* The connection's next request may come; of this one only the reply is still needed. */
static void release_connection(net_request *r)
{
    net_drop_body(r);
    net_connection *c = net_connection_of(r->net, bev_of(r));
    if (!c) return;
    c->is_answering = 0;
    c->reading_since = 0;
    c->idle_since = clock_seconds();
    net_begin_request(c);
}

void net_leave(net_request *r)
{
    if (!r->req) return;
    struct evhttp_connection *evcon = evhttp_request_get_connection(r->req);
    if (evcon) evhttp_connection_set_closecb(evcon, NULL, NULL);
    if (r->leaving) event_free(r->leaving);
    r->leaving = NULL;
    r->req = NULL;
}

/* libevent frees the connection, and the request with it unless it has taken them apart, as it does
 * when the connection fails before the reply is finished. */
static void on_closed(struct evhttp_connection *evcon, void *arg)
{
    (void)evcon;
    net_request *r = arg;
    struct evhttp_request *req = r->req;
    net_leave(r);
    if (!evhttp_request_get_connection(req)) evhttp_request_free(req);
    net_push(r->net, NET_GONE, r, -1);
}

static void give_up(net_request *r)
{
    struct evhttp_connection *evcon = evhttp_request_get_connection(r->req);
    net_leave(r);
    net_push(r->net, NET_GONE, r, -1);
    evhttp_connection_free(evcon);
}

/* libevent does not read while a reply is being made; a client that leaves is seen by this. A
 * client of HTTP/1.0 cannot be probed: it has left. */
static void on_leaving(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    net_request *r = arg;
    if (r->req->minor == 0) {
        give_up(r);
        return;
    }
    evhttp_add_header(evhttp_request_get_output_headers(r->req), "Connection", "close");
    net_push(r->net, NET_HALF, r, -1);
}

/* libevent reads while it writes, and takes the end of what it reads for the end of all: after each
 * call that writes reading has to stop. Whether a client has left `leaving` tells, or the write. */
static void stop_reading(const net_connection *c)
{
    if (c) bufferevent_disable(c->bev, EV_READ);
}

/* A reset comes as an error, which libevent hands to those only who read or write, and which would
 * keep the loop awake. */
void net_drop_reset(net *n)
{
    for (net_request *r = n->requests; r; r = r->next) {
        struct pollfd fd = {.fd = r->req ? bufferevent_getfd(bev_of(r)) : -1};
        if (poll(&fd, 1, 0) > 0 && fd.revents & POLLERR) give_up(r);
    }
}

/* An interim reply, which every client of HTTP/1.1 passes over (RFC 9110, 15.2). One that has left
 * answers it with a reset, which the next one meets. */
void net_probe(net_request *r)
{
    static const char interim[] = "HTTP/1.1 100 Continue\r\n\r\n";
    if (!r->req || r->is_chunked || net_pending(r) > 0) return;
    if (send(bufferevent_getfd(bev_of(r)), interim, sizeof interim - 1,
             MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
        errno != EAGAIN)
        give_up(r);
}

/* ---- what proxies could read in another way (RFC 9112, 3.2, 5.1, 6.3) ----------------------- */

static int is_token(const char *name)
{
    static const char *const others = "!#$%&'*+-.^_`|~";
    if (!*name) return 0;
    for (const char *c = name; *c; c++) {
        int is_alphanumeric =
            (*c >= '0' && *c <= '9') || (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z');
        if (!is_alphanumeric && !strchr(others, *c)) return 0;
    }
    return 1;
}

static int is_number(const char *text)
{
    size_t n = strspn(text, "0123456789");
    return n > 0 && n + strspn(text + n, " \t") == strlen(text);
}

/* libevent would take such a body for the next request. */
static int is_read_without_body(const struct evhttp_request *req)
{
    enum evhttp_cmd_type method = evhttp_request_get_command(req);
    return method == EVHTTP_REQ_HEAD || method == EVHTTP_REQ_TRACE;
}

/* What is wrong with a head, or NULL. Of fields that are read here or by what stands in front of
 * this server there may be one: with several, or a body whose length two rules give, each might go
 * by another one. */
static const char *fault_of_head(struct evhttp_request *req)
{
    static const char *const single[] = {"Host",   "Content-Length", "Transfer-Encoding",
                                         "Origin", "Authorization",  "Content-Type"};
    enum { HOST, LENGTH, ENCODING, N_SINGLE = sizeof single / sizeof *single };
    int seen[N_SINGLE] = {0};
    const struct evkeyvalq *fields = evhttp_request_get_input_headers(req);
    for (const struct evkeyval *f = fields->tqh_first; f; f = f->next.tqe_next) {
        if (!is_token(f->key)) return "the name of a header field is no token";
        for (int i = 0; i < N_SINGLE; i++)
            if (evutil_ascii_strcasecmp(f->key, single[i]) == 0 && seen[i]++)
                return "a header field comes twice that may come once";
        if (evutil_ascii_strcasecmp(f->key, "Content-Length") == 0 && !is_number(f->value))
            return "Content-Length: a number expected";
        if (evutil_ascii_strcasecmp(f->key, "Transfer-Encoding") == 0 &&
            evutil_ascii_strcasecmp(f->value, "chunked") != 0)
            return "Transfer-Encoding: nothing but chunked is taken";
    }
    if (seen[LENGTH] && seen[ENCODING])
        return "Content-Length and Transfer-Encoding exclude each other";
    if (seen[ENCODING] && req->minor == 0) return "Transfer-Encoding: unknown to HTTP/1.0";
    const char *length = evhttp_find_header(fields, "Content-Length");
    if ((seen[ENCODING] || (length && strcmp(length, "0") != 0)) && is_read_without_body(req))
        return "the method takes no body";
    return seen[HOST] || req->minor == 0 ? NULL : "Host: the header field is missing";
}

/* To a HEAD libevent writes the body that it is given, and no length (RFC 9110, 9.3.2). */
static void send_reply(struct evhttp_request *req, int status, struct evbuffer *body)
{
    if (body && evhttp_request_get_command(req) == EVHTTP_REQ_HEAD) {
        char length[32];
        snprintf(length, sizeof length, "%zu", evbuffer_get_length(body));
        evhttp_add_header(evhttp_request_get_output_headers(req), "Content-Length", length);
        evbuffer_drain(body, evbuffer_get_length(body));
    }
    evhttp_send_reply(req, status, net_phrase(status), body);
}

/* libevent sees that a client wants the connection closed where it says nothing else there
 * (RFC 9110, 7.6.1). */
static int asks_to_close(const struct evkeyvalq *fields)
{
    static const char *const between = ", \t";
    for (const struct evkeyval *f = fields->tqh_first; f; f = f->next.tqe_next) {
        if (evutil_ascii_strcasecmp(f->key, "Connection") != 0) continue;
        size_t n = 0;
        for (const char *at = f->value + strspn(f->value, between); *at;
             at += n + strspn(at + n, between)) {
            n = strcspn(at, between);
            if (n == 5 && evutil_ascii_strncasecmp(at, "close", n) == 0) return 1;
        }
    }
    return 0;
}

/* An error that closes the connection. */
static void answer_error(const net *n, struct evhttp_request *req, int status, const char *sentence)
{
    struct evkeyvalq *fields = evhttp_request_get_output_headers(req);
    struct evbuffer *body = evbuffer_new();
    if (body) net_add_error(n, body, status, sentence);
    if (n->error_type) evhttp_add_header(fields, "Content-Type", n->error_type);
    if (status == 503) evhttp_add_header(fields, "Retry-After", "2");
    evhttp_add_header(fields, "Connection", "close");
    send_reply(req, status, body);
    if (body) evbuffer_free(body);
}

/* The status with which a request is refused for its head, and why; 0 for none. */
static int refusal_of_head(struct evhttp_request *req, const char **why)
{
    int is_known = req->major == 1 && req->minor >= 0;
    if (!is_known || req->minor > 1) req->minor = 1; /* the version that is answered with */
    req->major = 1;
    req->flags &= ~EVHTTP_PROXY_REQUEST; /* a whole URI, behind which libevent would hang up */
    if (!is_known) {
        *why = "HTTP/1.1 expected";
        return 505;
    }
    if (evhttp_request_get_command(req) == EVHTTP_REQ_CONNECT) {
        req->type = EVHTTP_REQ_GET; /* evhttp ends no connection of the other kind */
        *why = "this server is no proxy";
        return 501;
    }
    *why = fault_of_head(req);
    return *why ? 400 : 0;
}

static void hand_out(net_request *r, net_connection *c)
{
    struct evhttp_connection *evcon = evhttp_request_get_connection(r->req);
    evutil_socket_t fd = bufferevent_getfd(bev_of(r));
    if (c) {
        c->is_answering = 1;
        c->reading_since = 0;
        c->stalled_since = clock_seconds();
    }
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* tokens are small and wanted now */
    if (asks_to_close(evhttp_request_get_input_headers(r->req)))
        evhttp_add_header(evhttp_request_get_output_headers(r->req), "Connection", "close");
    evhttp_connection_set_closecb(evcon, on_closed, r);
    r->leaving = event_new(r->net->base, fd, EV_CLOSED, on_leaving, r);
    if (r->leaving) event_add(r->leaving, NULL);
    net_push(r->net, NET_REQUEST, r, -1);
}

void net_on_request(struct evhttp_request *req, void *arg)
{
    net *n = arg;
    struct evhttp_connection *evcon = evhttp_request_get_connection(req);
    net_connection *c = net_connection_of(n, evhttp_connection_get_bufferevent(evcon));
    if (c) c->is_ours = 1;
    const char *why;
    int status = refusal_of_head(req, &why);
    if (status) {
        answer_error(n, req, status, why);
        return;
    }
    if (c && net_is_too_much(c)) {
        net_mark_refused(c);
        answer_error(n, req, 503, NET_TOO_MUCH);
        return;
    }
    net_request *r = mem_array(1, sizeof *r, NULL);
    if (!r) {
        answer_error(n, req, 503, "out of memory");
        return;
    }
    r->net = n;
    r->req = req;
    r->next = n->requests;
    n->requests = r;
    if (!r->next) net_arm(n);
    hand_out(r, c);
}

void net_request_free(net_request *r)
{
    if (!r) return;
    if (r->net) {
        net_forget_events(r->net, r);
        if (r->req) {
            struct evhttp_connection *evcon = evhttp_request_get_connection(r->req);
            net_leave(r);
            evhttp_connection_free(evcon);
        }
        net_request **at = &r->net->requests;
        while (*at != r) at = &(*at)->next;
        *at = r->next;
    }
    mem_free(r);
}

/* ---- looking --------------------------------------------------------------------------------- */

const char *net_method(const net_request *r)
{
    if (!r->req) return NULL;
    switch (evhttp_request_get_command(r->req)) {
    case EVHTTP_REQ_GET: return "GET";
    case EVHTTP_REQ_HEAD: return "HEAD";
    case EVHTTP_REQ_POST: return "POST";
    case EVHTTP_REQ_OPTIONS: return "OPTIONS";
    case EVHTTP_REQ_DELETE: return "DELETE";
    case EVHTTP_REQ_PUT: return "PUT";
    case EVHTTP_REQ_PATCH: return "PATCH";
    case EVHTTP_REQ_TRACE: return "TRACE";
    default: return "";
    }
}

const char *net_target(const net_request *r)
{
    return r->req ? evhttp_request_get_uri(r->req) : NULL;
}

const char *net_peer(const net_request *r)
{
    if (!r->req) return NULL;
    char *address = NULL;
    uint16_t port;
    evhttp_connection_get_peer(evhttp_request_get_connection(r->req), &address, &port);
    return address;
}

const char *net_header(const net_request *r, const char *name)
{
    return r->req ? evhttp_find_header(evhttp_request_get_input_headers(r->req), name) : NULL;
}

const void *net_body(const net_request *r, size_t *n_bytes)
{
    *n_bytes = 0;
    if (!r->req) return NULL;
    struct evbuffer *body = evhttp_request_get_input_buffer(r->req);
    *n_bytes = evbuffer_get_length(body);
    return *n_bytes ? evbuffer_pullup(body, -1) : (const void *)"";
}

size_t net_body_bytes(const net_request *r)
{
    return r->req ? evbuffer_get_length(evhttp_request_get_input_buffer(r->req)) : 0;
}

size_t net_pending(const net_request *r)
{
    return r->req ? evbuffer_get_length(bufferevent_get_output(bev_of(r))) : 0;
}

int net_is_over(const net_request *r)
{
    return !r->req;
}

/* ---- answering ------------------------------------------------------------------------------- */

/* A field that is there already, as Connection may be, comes once. */
static void add_fields(net_request *r, const net_field *fields, int n_fields)
{
    struct evkeyvalq *all = evhttp_request_get_output_headers(r->req);
    for (int i = 0; i < n_fields; i++) {
        evhttp_remove_header(all, fields[i].name);
        evhttp_add_header(all, fields[i].name, fields[i].value);
    }
}

void net_start(net_request *r, int status, const net_field *fields, int n_fields)
{
    if (!r->req || r->is_chunked) return;
    add_fields(r, fields, n_fields);
    r->is_chunked = 1;
    /* Where HTTP/1.0 wants to keep the connection libevent would write a length of 0. */
    if (r->req->minor == 0)
        evhttp_remove_header(evhttp_request_get_input_headers(r->req), "Connection");
    const net_connection *c = net_connection_of(r->net, bev_of(r));
    evhttp_send_reply_start(r->req, status, net_phrase(status));
    stop_reading(c);
}

err_code net_write(net_request *r, const void *data, size_t n_bytes, err_info *e)
{
    if (!r->req || !r->is_chunked || n_bytes == 0) return ERR_NONE;
    size_t pending = net_pending(r);
    struct evbuffer *piece = evbuffer_new();
    if (!piece || evbuffer_add(piece, data, n_bytes) != 0) {
        if (piece) evbuffer_free(piece);
        return err_set(e, ERR_MEMORY, "out of memory for a reply");
    }
    if (pending + n_bytes > (size_t)r->net->limits.pending_bytes) {
        evbuffer_free(piece);
        net_drop(bev_of(r));
        return err_set(e, ERR_LIMIT, "the client does not read: %zu bytes wait", pending);
    }
    const net_connection *c = net_connection_of(r->net, bev_of(r));
    evhttp_send_reply_chunk(r->req, piece);
    stop_reading(c);
    evbuffer_free(piece);
    return ERR_NONE;
}

void net_finish(net_request *r)
{
    if (!r->req || !r->is_chunked) return;
    struct evhttp_request *req = r->req;
    net_connection *c = net_connection_of(r->net, bev_of(r));
    release_connection(r);
    net_leave(r);
    evhttp_send_reply_end(req);
    if (c && evbuffer_get_length(bufferevent_get_output(c->bev)) > 0)
        stop_reading(c);
    else if (c) /* nothing was left to write: libevent reads the next request by now */
        c->is_ours = 0;
}

void net_reply(net_request *r, int status, const net_field *fields, int n_fields, const void *data,
               size_t n_bytes)
{
    if (!r->req || r->is_chunked) return;
    struct evhttp_request *req = r->req;
    struct evbuffer *body = evbuffer_new();
    if (body) evbuffer_add(body, data, n_bytes);
    const net_connection *c = net_connection_of(r->net, bev_of(r));
    add_fields(r, fields, n_fields);
    release_connection(r);
    net_leave(r);
    send_reply(req, status, body);
    stop_reading(c);
    if (body) evbuffer_free(body);
}
