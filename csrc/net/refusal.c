/* refusal: what the loop answers itself. */
#include "net/net_impl.h"

#include <stdio.h>
#include <sys/socket.h>

const char *net_phrase(int status)
{
    static const struct {
        int status;
        const char *phrase;
    } known[] = {
        {200, "OK"},
        {204, "No Content"},
        {400, "Bad Request"},
        {401, "Unauthorized"},
        {403, "Forbidden"},
        {404, "Not Found"},
        {405, "Method Not Allowed"},
        {413, "Content Too Large"},
        {415, "Unsupported Media Type"},
        {417, "Expectation Failed"},
        {422, "Unprocessable Content"},
        {429, "Too Many Requests"},
        {500, "Internal Server Error"},
        {501, "Not Implemented"},
        {503, "Service Unavailable"},
        {505, "HTTP Version Not Supported"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].status == status) return known[i].phrase;
    return "";
}

void net_add_error(const net *n, struct evbuffer *body, int status, const char *sentence)
{
    if (n->error_type)
        evbuffer_add_printf(body, "%s%s%s", n->error_before, sentence,
                            status < 500 ? n->error_after : n->error_after_failure);
}

/* A whole reply; the connection ends behind it. */
static struct evbuffer *error_reply(const net *n, int status, const char *fields,
                                    const char *sentence)
{
    struct evbuffer *reply = evbuffer_new(), *body = evbuffer_new();
    if (!reply || !body) {
        if (reply) evbuffer_free(reply);
        if (body) evbuffer_free(body);
        return NULL;
    }
    net_add_error(n, body, status, sentence);
    evbuffer_add_printf(reply, "HTTP/1.1 %d %s\r\n%s", status, net_phrase(status), fields);
    if (n->error_type) evbuffer_add_printf(reply, "Content-Type: %s\r\n", n->error_type);
    evbuffer_add_printf(reply, "Content-Length: %zu\r\nConnection: close\r\n\r\n",
                        evbuffer_get_length(body));
    evbuffer_add_buffer(reply, body);
    evbuffer_free(body);
    return reply;
}

/* libevent writes a page of HTML where it cannot read a request, and this version has no way to
 * give it another one. It waits in the output until the loop comes round: what it is stands in its
 * first line. */
void net_respell_error(net_connection *c)
{
    struct evbuffer *output = bufferevent_get_output(c->bev);
    char line[sizeof "HTTP/1.1 400"] = "", sentence[128];
    int status = 0;
    c->is_foreign = 0;
    evbuffer_unfreeze(output, 1); /* a bufferevent lets nobody look into its output */
    evbuffer_copyout(output, line, sizeof line - 1);
    evbuffer_freeze(output, 1);
    if (sscanf(line, "HTTP/1.%*d %d", &status) != 1 || status < 400) return; /* 100 */
    if (status == 400)
        snprintf(sentence, sizeof sentence, "malformed HTTP, or a head of more than %lld bytes",
                 (long long)c->net->limits.header_bytes);
    else if (status == 413)
        snprintf(sentence, sizeof sentence,
                 "the body, or what is behind it, is too large or cannot be read");
    else
        snprintf(sentence, sizeof sentence, "%s", net_phrase(status));
    struct evbuffer *reply = error_reply(c->net, status, "", sentence);
    if (!reply) return;
    evbuffer_unfreeze(output, 1);
    evbuffer_drain(output, evbuffer_get_length(output));
    evbuffer_freeze(output, 1);
    c->is_ours = 1;
    evbuffer_add_buffer(output, reply);
    evbuffer_free(reply);
}

static struct evbuffer *refusal_of(const net_connection *c)
{
    char sentence[128];
    if (!c->fault) return error_reply(c->net, 503, "Retry-After: 2\r\n", NET_TOO_MUCH);
    if (c->fault == 413)
        snprintf(sentence, sizeof sentence, "the body has more than %lld bytes",
                 (long long)c->net->limits.body_bytes);
    else if (net_is_among_fields(&c->framing))
        snprintf(sentence, sizeof sentence,
                 "a line of the head begins with a blank, or has a NUL or a CR in it");
    else
        snprintf(sentence, sizeof sentence,
                 "a chunk of the body has no size or no end that can be read");
    return error_reply(c->net, c->fault, "", sentence);
}

/* libevent has no answer for a request that it has not read. A client that is still sending would
 * lose this one if the connection were closed now (RFC 9112, 9.6): it is left to close it, within
 * request_seconds. */
void net_refuse(net_connection *c)
{
    evutil_socket_t fd = bufferevent_getfd(c->bev);
    struct evbuffer *input = bufferevent_get_input(c->bev);
    struct evbuffer *reply = refusal_of(c);
    net_mark_refused(c);
    evbuffer_drain(input, evbuffer_get_length(input));
    int is_sent = reply && evbuffer_get_length(bufferevent_get_output(c->bev)) == 0 &&
                  send(fd, evbuffer_pullup(reply, -1), evbuffer_get_length(reply),
                       MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
    if (reply) evbuffer_free(reply);
    size_t of_others = c->net->in_refused - c->refused;
    if (is_sent && of_others <= (size_t)(c->net->limits.total_bytes / 2))
        shutdown(fd, SHUT_WR);
    else
        net_drop(c->bev);
}
