/* net_impl: what the parts of the net room share. Internal to it. */
#ifndef NET_NET_IMPL_H
#define NET_NET_IMPL_H

#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/http.h>

#include "net/framing.h"
#include "net/net.h"

enum { NET_MAX_LISTENERS = 8 };

#define NET_TOO_MUCH "requests that are being answered take too much memory; try again"

typedef struct net_connection {
    struct net_connection *next;
    net *net;
    struct bufferevent *bev;          /* one reference */
    int is_ours;                      /* what is being written is a reply of ours */
    int is_foreign;                   /* libevent's own, nothing of which is sent yet */
    int is_answering;                 /* a request was read, its reply is not finished */
    int is_refused;                   /* told so; what it still sends is thrown away */
    int is_spared;                    /* closed for the sake of others */
    int fault;                        /* status with which its request has to be refused, or 0 */
    net_framing framing;              /* where in a request the bytes are that come */
    size_t received;                  /* bytes of the request that is read or answered */
    size_t refused;                   /* of one that was refused, which are there until it ends */
    double idle_since, reading_since; /* seconds; 0: is not */
    double stalled_since;             /* when the client last took something, or could not */
} net_connection;

struct net {
    net_limits limits;
    struct event_base *base;
    struct evhttp *http;
    struct event *sweeper;
    struct evhttp_bound_socket *listeners[NET_MAX_LISTENERS];
    int n_listeners, is_full;
    char *error_type, *error_before; /* NULL: errors have no body */
    char *error_after, *error_after_failure;
    struct event **watched; /* [n_watched] of watched_room */
    int n_watched, watched_room;
    net_connection *connections;
    int n_connections;
    size_t in_common;      /* received bytes beyond what each connection may have anyway */
    size_t in_refused;     /* bytes of requests that were refused */
    net_request *requests; /* not freed yet */
    net_event *events;     /* [n_events] to be handed out, oldest first */
    int n_events, events_room;
};

struct net_request {
    net *net;                   /* NULL once closed */
    struct evhttp_request *req; /* NULL once over */
    struct event *leaving;      /* tells that the client has closed its side */
    int is_chunked;             /* the reply has begun */
    net_request *next;
};

void net_push(net *n, net_kind kind, net_request *request, int fd);
void net_forget_events(net *n, const net_request *r);
net_connection *net_connection_of(net *n, const struct bufferevent *bev);
/* The connection has this many bytes of a request from now on. */
void net_count(net_connection *c, size_t received);
/* What it sends from now on, and what of that is there already, is its next request. */
void net_begin_request(net_connection *c);
/* Its request has to be refused: all of them together have too many bytes. */
int net_is_too_much(const net_connection *c);
/* It is: what it has keeps no others from being read. */
void net_mark_refused(net_connection *c);
void net_drop(struct bufferevent *bev);
/* The standard phrase of a status; "" for one that has none. */
const char *net_phrase(int status);
/* Adds the body of an error that the loop answers; nothing without a form. */
void net_add_error(const net *n, struct evbuffer *body, int status, const char *sentence);
/* Puts an error of ours in the place of one of libevent's. */
void net_respell_error(net_connection *c);
/* Answers a request that libevent has not read; nothing more is read of this connection. */
void net_refuse(net_connection *c);
/* evhttp's callback for every request. */
void net_on_request(struct evhttp_request *req, void *arg);
/* Connections of requests that were reset have ended. */
void net_drop_reset(net *n);
/* Has the loop look after its connections in a while; a shorter one while there are requests. */
void net_arm(net *n);
/* The request is over; its client is not heard of any more. */
void net_leave(net_request *r);

#endif
