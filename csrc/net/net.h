/* net: an event loop with an HTTP/1.1 server, on libevent.
 *
 * The loop hands out events instead of calling back, so that what handles them (Lua) never runs
 * inside libevent. One thread uses a net and everything that comes from it.
 *
 * Sizes, waiting times and the number of connections are bounded: headers and bodies beyond their
 * limits are refused before they arrive, as far as it is known then, and what comes of them is
 * thrown away, so that the client can read why. What a client sends while it is answered is not
 * read beyond these limits. One that takes too long to send a request or to read its reply is
 * dropped. Beyond the limit of connections nobody is accepted until one ends; while somebody waits
 * for that, the connection that has been idle longest is closed, or if none is, the one whose
 * request has been arriving longest.
 *
 * Requests may have so many bytes together; of those that would need more the last to come are
 * answered 503 by the loop, and the rest of them is thrown away. Half of these bytes are shared out
 * evenly, so that many large requests leave room for small ones. What was refused is held until its
 * client goes; one that comes while more than half of these bytes are held so is dropped.
 *
 * Malformed HTTP is answered by the loop (400, or the connection is closed); so is what two
 * programs could read differently: several lengths, hosts or origins, names that are no tokens,
 * fields that go on in a second line, NULs and CRs within lines. */
#ifndef NET_NET_H
#define NET_NET_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct net net;
typedef struct net_request net_request;

typedef struct net_limits { /* 0 takes the default */
    int64_t header_bytes;   /* 64 KiB */
    int64_t body_bytes;     /* 64 MiB */
    int64_t total_bytes;    /* of requests not answered yet, together: 4 x body_bytes */
    int64_t pending_bytes;  /* of a reply that its client has not read yet: 4 MiB */
    int connections;        /* 256 */
    double grace_seconds;   /* of an idle connection while others wait for its place: 1; ten times
                             * as long of one that is sending a request */
    double idle_seconds;    /* of a connection between requests: 120 */
    double request_seconds; /* from the first byte of a request to its last: 60 */
    double write_seconds;   /* without a byte of the reply being taken: 30 */
} net_limits;

/* Has the process ignore SIGPIPE from then on, if it did nothing about it. NULL on failure. */
net *net_open(const net_limits *limits, err_info *e);
/* Closes every connection; requests not freed yet become gone and must still be freed. */
void net_close(net *n);

/* Bodies of the errors that the loop answers itself: a sentence, without quotes or backslashes,
 * between two texts, of which the second is another one behind a status of 500 and more. Without
 * this they are empty. */
err_code net_set_error_form(net *n, const char *content_type, const char *before, const char *after,
                            const char *after_failure, err_info *e);

/* Accepts connections at host (an address or a name) and port; 0 takes a free one. Returns the
 * port, or -1. */
int net_listen(net *n, const char *host, int port, err_info *e);
/* Accepts no more; what is open goes on. */
void net_stop_listening(net *n);
/* Connections that are open. */
int net_n_connections(const net *n);
/* Bytes of replies that still have to be handed to the system; clients that do not take them are
 * dropped after write_seconds. */
size_t net_unsent(const net *n);

typedef enum net_kind {
    NET_NONE,
    NET_REQUEST, /* a complete request: the receiver's, to free */
    NET_GONE,    /* the client of `request` left before the reply was finished */
    NET_HALF,    /* it sends no more: it has left, or has only closed its side; net_probe tells */
    NET_READY,   /* `fd`, which is watched, can be read */
    NET_SIGNAL,  /* `fd` is the number of a caught signal */
} net_kind;

typedef struct net_event {
    net_kind kind;
    net_request *request;
    int fd;
} net_event;

/* The next event, waiting for one up to `seconds` (< 0: for ever). NET_NONE when the time is over.
 * An event of a request that was freed meanwhile is not handed out. */
err_code net_wait(net *n, double seconds, net_event *event, err_info *e);

/* Readable from then on means NET_READY, as long as it is readable. */
err_code net_watch(net *n, int fd, err_info *e);
void net_unwatch(net *n, int fd);

/* The signal is caught once and comes as an event; the next one does what it does by default. A
 * SIGHUP that is ignored stays so: nohup's programs outlive their terminal. */
err_code net_catch_signal(net *n, int number, err_info *e);

/* ---- requests ------------------------------------------------------------------------------ */

/* Of the request line, as sent: "POST", "/v1/models?limit=3". Borrowed while the client is there;
 * NULL afterwards, like everything here. */
const char *net_method(const net_request *r);
const char *net_target(const net_request *r);
const char *net_peer(const net_request *r); /* numeric address */
/* The first header of that name, in any case of letters. */
const char *net_header(const net_request *r, const char *name);
const void *net_body(const net_request *r, size_t *n_bytes);
size_t net_body_bytes(const net_request *r);
/* Lets go of the body, which counts no more among the bytes of requests. */
void net_drop_body(net_request *r);

/* True once the client has left or the reply is finished. */
int net_is_over(const net_request *r);

/* Writes what a client that is still there passes over, so that NET_GONE follows if there is none:
 * by the first or, through tunnels, a later call. Does nothing once the reply has begun: write
 * then. */
void net_probe(net_request *r);

typedef struct net_field {
    const char *name, *value;
} net_field;

/* Begins a reply whose length is not known: chunked, or to the end of the connection for HTTP/1.0.
 * Nothing happens on a request that is over. */
void net_start(net_request *r, int status, const net_field *fields, int n_fields);
/* A piece of it. ERR_LIMIT when the client does not read: it is dropped. */
err_code net_write(net_request *r, const void *data, size_t n_bytes, err_info *e);
void net_finish(net_request *r);

/* Bytes of the reply that wait for the client to take what was written before. */
size_t net_pending(const net_request *r);

/* A whole reply, with Content-Length; to a HEAD without its data. */
void net_reply(net_request *r, int status, const net_field *fields, int n_fields, const void *data,
               size_t n_bytes);

/* Frees the request; one that is not over loses its connection. */
void net_request_free(net_request *r);

#endif
