/* net: the loop, listening, and the life of connections; requests are in request.c, what is refused
 * before there is one in refusal.c. */
#include "net/net_impl.h"

#include <errno.h>
#include <event2/listener.h>
#include <event2/util.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>

#include "base/clock.h"
#include "base/mem.h"

enum { SWEEP_MS = 1000, LOOK_MS = 100, LONGEST_WAIT = 1 << 30 };

/* ---- events ---------------------------------------------------------------------------------- */

void net_push(net *n, net_kind kind, net_request *request, int fd)
{
    if (n->n_events == n->events_room) {
        int room = n->events_room ? 2 * n->events_room : 64;
        net_event *grown = mem_array((size_t)room, sizeof *grown, NULL);
        if (!grown)
            return; /* the client of a request that nobody hears of runs into its time-out */
        if (n->n_events) memcpy(grown, n->events, (size_t)n->n_events * sizeof *grown);
        mem_free(n->events);
        n->events = grown;
        n->events_room = room;
    }
    n->events[n->n_events++] = (net_event){kind, request, fd};
}

void net_forget_events(net *n, const net_request *r)
{
    int kept = 0;
    for (int i = 0; i < n->n_events; i++)
        if (n->events[i].request != r) n->events[kept++] = n->events[i];
    n->n_events = kept;
}

/* ---- connections ----------------------------------------------------------------------------- */

static size_t beyond_share(const net_connection *c)
{
    const net_limits *l = &c->net->limits;
    size_t share = (size_t)(l->total_bytes / 2 / l->connections);
    return c->received > share ? c->received - share : 0;
}

void net_count(net_connection *c, size_t received)
{
    c->net->in_common -= beyond_share(c);
    c->received = received;
    c->net->in_common += beyond_share(c);
}

static size_t most_of_one(const net *n)
{
    return (size_t)(n->limits.header_bytes + n->limits.body_bytes);
}

/* Whether a request is there, or begins to be. */
static int begin(struct evbuffer *input)
{
    char line[2];
    for (;;) {
        ev_ssize_t there = evbuffer_copyout(input, line, sizeof line);
        int n = there > 0 ? net_empty_line(line, (size_t)there) : -1;
        if (n <= 0) return n == 0;
        evbuffer_drain(input, (size_t)n);
    }
}

/* Looks at the last bytes of the input. Of a request that has to be refused libevent gets no more.
 */
static void follow(net_connection *c, size_t n_bytes)
{
    struct evbuffer *input = bufferevent_get_input(c->bev);
    if (!c->framing.has_begun) {
        if (!begin(input)) return;
        n_bytes = evbuffer_get_length(input); /* an empty line may have come before them */
    }
    struct evbuffer_ptr at;
    struct evbuffer_iovec piece;
    evbuffer_ptr_set(input, &at, evbuffer_get_length(input) - n_bytes, EVBUFFER_PTR_SET);
    while (n_bytes > 0 && !c->fault && evbuffer_peek(input, -1, &at, &piece, 1) > 0) {
        c->fault = net_follow(&c->framing, (uint64_t)c->net->limits.body_bytes, piece.iov_base,
                              piece.iov_len);
        n_bytes -= piece.iov_len;
        evbuffer_ptr_set(input, &at, piece.iov_len, EVBUFFER_PTR_ADD);
    }
    if (c->fault) evbuffer_drain(input, evbuffer_get_length(input));
}

void net_begin_request(net_connection *c)
{
    c->framing = (net_framing){0};
    follow(c, evbuffer_get_length(bufferevent_get_input(c->bev)));
}

static void on_input(struct evbuffer *buffer, const struct evbuffer_cb_info *info, void *arg)
{
    net_connection *c = arg;
    if (info->n_added == 0 || c->is_answering) return;
    if (c->is_refused)
        evbuffer_drain(buffer, info->n_added);
    else
        follow(c, info->n_added);
    if (c->reading_since == 0 && c->framing.has_begun) c->reading_since = clock_seconds();
    if (c->is_refused || c->fault) return;
    /* Chunks may have more around them than in them, which is not kept. */
    size_t received = c->received + info->n_added, most = most_of_one(c->net);
    net_count(c, received < most ? received : most);
}

/* Of what is written without a request, libevent's pages of errors, the connection is told once it
 * is all sent. */
static void on_output(struct evbuffer *buffer, const struct evbuffer_cb_info *info, void *arg)
{
    net_connection *c = arg;
    if (info->n_added > 0 && !c->is_ours) c->is_foreign = 1;
    if (info->n_deleted == 0) return;
    c->stalled_since = clock_seconds();
    c->is_foreign = 0;
    if (evbuffer_get_length(buffer) == 0 && !c->is_answering) c->is_ours = 0;
}

/* libevent tells nobody when it frees a connection. A reference of ours keeps the bufferevent
 * alive until the sweep sees that libevent has let go of it (it then has no callbacks). */
static struct bufferevent *on_accept(struct event_base *base, void *arg)
{
    net *n = arg;
    struct bufferevent *bev = bufferevent_socket_new(base, -1, BEV_OPT_CLOSE_ON_FREE);
    net_connection *c = bev ? mem_array(1, sizeof *c, NULL) : NULL;
    if (!c) return bev;
    bufferevent_incref(bev);
    /* While it writes an error of its own libevent reads on, however much comes. */
    bufferevent_setwatermark(bev, EV_READ, 0, most_of_one(n));
    c->net = n;
    c->bev = bev;
    c->idle_since = clock_seconds();
    c->next = n->connections;
    n->connections = c;
    n->n_connections++;
    evbuffer_add_cb(bufferevent_get_input(bev), on_input, c);
    evbuffer_add_cb(bufferevent_get_output(bev), on_output, c);
    return bev;
}

net_connection *net_connection_of(net *n, const struct bufferevent *bev)
{
    for (net_connection *c = n->connections; c; c = c->next)
        if (c->bev == bev) return c;
    return NULL;
}

static int is_let_go(const net_connection *c)
{
    bufferevent_data_cb read, write;
    bufferevent_event_cb event;
    void *arg;
    bufferevent_getcb(c->bev, &read, &write, &event, &arg);
    return !read && !write && !event;
}

void net_drop(struct bufferevent *bev)
{
    /* libevent sees the end of the stream and frees what belongs to the connection. */
    evutil_socket_t fd = bufferevent_getfd(bev);
    if (fd >= 0) shutdown(fd, SHUT_RDWR);
}

int net_is_too_much(const net_connection *c)
{
    const net *n = c->net;
    return !c->is_refused && !c->is_answering && beyond_share(c) > 0 &&
           n->in_common > (size_t)(n->limits.total_bytes / 2);
}

void net_mark_refused(net_connection *c)
{
    c->is_refused = 1;
    c->refused = c->received;
    c->net->in_refused += c->refused;
    net_count(c, 0);
}

/* ---- the life of connections ----------------------------------------------------------------- */

static int is_late(const net *n, net_connection *c, double now)
{
    size_t pending = evbuffer_get_length(bufferevent_get_output(c->bev));
    if (pending == 0) c->stalled_since = now;
    if (pending > 0) return now - c->stalled_since > n->limits.write_seconds;
    if (c->is_answering) return 0;
    if (c->reading_since > 0) return now - c->reading_since > n->limits.request_seconds;
    return now - c->idle_since > n->limits.idle_seconds;
}

/* Whether somebody waits to be accepted. */
static int is_waited_for(const net *n)
{
    struct pollfd fds[NET_MAX_LISTENERS];
    for (int i = 0; i < n->n_listeners; i++)
        fds[i] = (struct pollfd){evhttp_bound_socket_get_fd(n->listeners[i]), POLLIN, 0};
    return n->n_listeners > 0 && poll(fds, (nfds_t)n->n_listeners, 0) > 0;
}

/* Of connections that keep others out, the one to be closed: nothing was asked on it, and it has
 * had its time. */
static net_connection *to_spare(const net *n, double now)
{
    net_connection *idle = NULL, *sending = NULL;
    for (net_connection *c = n->connections; c; c = c->next) {
        if (c->is_answering || c->is_spared || is_let_go(c) ||
            evbuffer_get_length(bufferevent_get_output(c->bev)) > 0)
            continue;
        if (c->reading_since > 0) {
            if (now - c->reading_since >= 10 * n->limits.grace_seconds &&
                (!sending || c->reading_since < sending->reading_since))
                sending = c;
        } else if (now - c->idle_since >= n->limits.grace_seconds &&
                   (!idle || c->idle_since < idle->idle_since)) {
            idle = c;
        }
    }
    return idle ? idle : sending;
}

static void make_room(net *n, double now)
{
    net_connection *c = is_waited_for(n) ? to_spare(n, now) : NULL;
    if (!c) return;
    c->is_spared = 1;
    net_drop(c->bev);
}

/* Forgets connections that have ended, drops those that take too long, refuses what is too much. */
static void sweep(net *n)
{
    double now = clock_seconds();
    for (net_connection **at = &n->connections; *at;) {
        net_connection *c = *at;
        if (is_let_go(c)) {
            *at = c->next;
            net_count(c, 0);
            n->in_refused -= c->refused;
            evbuffer_remove_cb(bufferevent_get_input(c->bev), on_input, c);
            evbuffer_remove_cb(bufferevent_get_output(c->bev), on_output, c);
            bufferevent_decref(c->bev);
            mem_free(c);
            n->n_connections--;
            continue;
        }
        if (c->is_foreign) net_respell_error(c);
        if (!c->is_ours && !c->is_refused && (c->fault || net_is_too_much(c))) net_refuse(c);
        if (is_late(n, c, now)) net_drop(c->bev);
        at = &c->next;
    }
    int full = n->n_connections >= n->limits.connections;
    if (full) make_room(n, now);
    if (full == n->is_full) return;
    n->is_full = full;
    for (int i = 0; i < n->n_listeners; i++) {
        struct evconnlistener *l = evhttp_bound_socket_get_listener(n->listeners[i]);
        if (full)
            evconnlistener_disable(l);
        else
            evconnlistener_enable(l);
    }
}

void net_arm(net *n)
{
    int ms = n->requests ? LOOK_MS : SWEEP_MS;
    const struct timeval time = {.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000};
    event_add(n->sweeper, &time);
}

static void on_sweep(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    net_drop_reset(arg);
    sweep(arg);
    net_arm(arg);
}

/* ---- opening --------------------------------------------------------------------------------- */

static void fill_limits(net_limits *l)
{
    if (!l->header_bytes) l->header_bytes = 64 << 10;
    if (!l->body_bytes) l->body_bytes = 64 << 20;
    if (!l->total_bytes) l->total_bytes = 4 * l->body_bytes;
    if (!l->pending_bytes) l->pending_bytes = 4 << 20;
    if (!l->connections) l->connections = 256;
    if (!(l->grace_seconds > 0)) l->grace_seconds = 1;
    if (!(l->idle_seconds > 0)) l->idle_seconds = 120;
    if (!(l->request_seconds > 0)) l->request_seconds = 60;
    if (!(l->write_seconds > 0)) l->write_seconds = 30;
}

static err_code open_into(net *n, err_info *e)
{
    if (!(n->base = event_base_new()) || !(n->http = evhttp_new(n->base)) ||
        !(n->sweeper = event_new(n->base, -1, 0, on_sweep, n)))
        return err_set(e, ERR_IO, "cannot open an event loop");
    net_arm(n);
    evhttp_set_allowed_methods(n->http, EVHTTP_REQ_GET | EVHTTP_REQ_HEAD | EVHTTP_REQ_POST |
                                            EVHTTP_REQ_OPTIONS | EVHTTP_REQ_DELETE |
                                            EVHTTP_REQ_PUT | EVHTTP_REQ_PATCH | EVHTTP_REQ_TRACE |
                                            EVHTTP_REQ_CONNECT);
    evhttp_set_max_headers_size(n->http, n->limits.header_bytes);
    evhttp_set_max_body_size(n->http, n->limits.body_bytes);
    evhttp_set_default_content_type(n->http, NULL);
    evhttp_set_bevcb(n->http, on_accept, n);
    evhttp_set_gencb(n->http, net_on_request, n);
    return ERR_NONE;
}

/* A write to a client that has left is an error like any other; libevent has no way to ask for
 * that but the process's. A handler that somebody has set stays. */
static void ignore_broken_pipes(void)
{
    struct sigaction old, ignore = {.sa_handler = SIG_IGN};
    sigemptyset(&ignore.sa_mask);
    if (sigaction(SIGPIPE, NULL, &old) == 0 && old.sa_handler == SIG_DFL)
        sigaction(SIGPIPE, &ignore, NULL);
}

net *net_open(const net_limits *limits, err_info *e)
{
    ignore_broken_pipes();
    net *n = mem_array(1, sizeof *n, e);
    if (!n) return NULL;
    if (limits) n->limits = *limits;
    fill_limits(&n->limits);
    if (open_into(n, e)) {
        net_close(n);
        return NULL;
    }
    return n;
}

void net_close(net *n)
{
    if (!n) return;
    for (net_request *r = n->requests; r; r = r->next) net_leave(r);
    if (n->http) evhttp_free(n->http); /* and the listeners */
    n->n_listeners = 0;
    if (n->base) sweep(n);
    for (int i = 0; i < n->n_watched; i++) event_free(n->watched[i]);
    mem_free(n->watched);
    if (n->sweeper) event_free(n->sweeper);
    for (net_request *r = n->requests; r; r = r->next) r->net = NULL;
    for (int i = 0; i < n->n_events; i++) /* nobody has seen these */
        if (n->events[i].kind == NET_REQUEST) net_request_free(n->events[i].request);
    if (n->base) event_base_free(n->base);
    mem_free(n->events);
    mem_free(n->error_type);
    mem_free(n->error_before);
    mem_free(n->error_after);
    mem_free(n->error_after_failure);
    mem_free(n);
}

err_code net_set_error_form(net *n, const char *content_type, const char *before, const char *after,
                            const char *after_failure, err_info *e)
{
    const char *const given[] = {content_type, before, after, after_failure};
    char **const kept[] = {&n->error_type, &n->error_before, &n->error_after,
                           &n->error_after_failure};
    char *made[4];
    for (int i = 0; i < 4; i++) made[i] = mem_copy(given[i], strlen(given[i]), e);
    int is_whole = made[0] && made[1] && made[2] && made[3];
    for (int i = 0; i < 4; i++) {
        mem_free(is_whole ? *kept[i] : made[i]);
        if (is_whole) *kept[i] = made[i];
    }
    return is_whole ? ERR_NONE : ERR_MEMORY;
}

/* Whether there is such an address: libevent, asked to listen at none, writes of it to stderr and
 * does not say why. */
static err_code check_host(const char *host, err_info *e)
{
    const struct addrinfo hints = {.ai_flags = AI_PASSIVE, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found = NULL;
    int problem = getaddrinfo(host, NULL, &hints, &found);
    if (problem) return err_set(e, ERR_IO, "cannot listen at %s: %s", host, gai_strerror(problem));
    freeaddrinfo(found);
    return ERR_NONE;
}

int net_listen(net *n, const char *host, int port, err_info *e)
{
    struct sockaddr_storage address;
    socklen_t size = sizeof address;
    if (n->n_listeners == NET_MAX_LISTENERS) {
        err_set(e, ERR_LIMIT, "more than %d addresses to listen at", NET_MAX_LISTENERS);
        return -1;
    }
    if (check_host(host, e)) return -1;
    struct evhttp_bound_socket *bound =
        evhttp_bind_socket_with_handle(n->http, host, (uint16_t)port);
    if (!bound) {
        err_set(e, ERR_IO, "cannot listen at %s port %d: %s", host, port, strerror(errno));
        return -1;
    }
    n->listeners[n->n_listeners++] = bound;
    if (getsockname(evhttp_bound_socket_get_fd(bound), (struct sockaddr *)&address, &size) != 0) {
        err_set(e, ERR_IO, "cannot listen at %s: %s", host, strerror(errno));
        return -1;
    }
    return address.ss_family == AF_INET6 ? ntohs(((struct sockaddr_in6 *)&address)->sin6_port)
                                         : ntohs(((struct sockaddr_in *)&address)->sin_port);
}

void net_stop_listening(net *n)
{
    while (n->n_listeners > 0) evhttp_del_accept_socket(n->http, n->listeners[--n->n_listeners]);
}

int net_n_connections(const net *n)
{
    return n->n_connections;
}

size_t net_unsent(const net *n)
{
    size_t sum = 0;
    for (const net_connection *c = n->connections; c; c = c->next)
        if (!is_let_go(c)) sum += evbuffer_get_length(bufferevent_get_output(c->bev));
    return sum;
}

/* ---- waiting --------------------------------------------------------------------------------- */

static void on_time(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    *(int *)arg = 1;
}

err_code net_wait(net *n, double seconds, net_event *event, err_info *e)
{
    int over = 0;
    struct event *timer = NULL;
    if (seconds > LONGEST_WAIT) seconds = LONGEST_WAIT; /* a time_t holds that */
    if (seconds >= 0 && n->n_events == 0) {
        struct timeval time = {.tv_sec = (time_t)seconds};
        time.tv_usec = (suseconds_t)((seconds - (double)time.tv_sec) * 1e6);
        timer = event_new(n->base, -1, 0, on_time, &over);
        if (!timer || event_add(timer, &time) != 0) {
            if (timer) event_free(timer);
            return err_set(e, ERR_MEMORY, "cannot set a timer");
        }
    }
    while (n->n_events == 0 && !over) {
        if (event_base_loop(n->base, EVLOOP_ONCE) < 0) break;
        sweep(n);
    }
    if (timer) event_free(timer);
    *event = (net_event){.kind = NET_NONE};
    if (n->n_events == 0) return over ? ERR_NONE : err_set(e, ERR_IO, "the event loop has failed");
    *event = n->events[0];
    memmove(n->events, n->events + 1, (size_t)--n->n_events * sizeof *event);
    return ERR_NONE;
}

static void on_ready(evutil_socket_t fd, short what, void *arg)
{
    (void)what;
    net_push(arg, NET_READY, NULL, (int)fd);
}

static void on_signal(evutil_socket_t number, short what, void *arg)
{
    (void)what;
    net_push(arg, NET_SIGNAL, NULL, (int)number);
}

static err_code make_room_to_watch(net *n, err_info *e)
{
    if (n->n_watched < n->watched_room) return ERR_NONE;
    int room = n->watched_room ? 2 * n->watched_room : 16;
    struct event **grown = mem_array((size_t)room, sizeof *grown, e);
    if (!grown) return ERR_MEMORY;
    if (n->n_watched) memcpy(grown, n->watched, (size_t)n->n_watched * sizeof *grown);
    mem_free(n->watched);
    n->watched = grown;
    n->watched_room = room;
    return ERR_NONE;
}

static err_code watch(net *n, struct event *event, err_info *e)
{
    if (!event) return err_set(e, ERR_MEMORY, "cannot make an event");
    err_code code = make_room_to_watch(n, e);
    if (!code && event_add(event, NULL) != 0)
        code = err_set(e, ERR_IO, "%d cannot be waited for", (int)event_get_fd(event));
    if (code)
        event_free(event);
    else
        n->watched[n->n_watched++] = event;
    return code;
}

/* What epoll takes (epoll_ctl(2), EPERM): of what it does not, libevent prints a warning. */
static int can_be_watched(int fd)
{
    struct stat info;
    return fstat(fd, &info) == 0 && !S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode);
}

err_code net_watch(net *n, int fd, err_info *e)
{
    if (!can_be_watched(fd)) return err_set(e, ERR_IO, "%d cannot be waited for", fd);
    return watch(n, event_new(n->base, fd, EV_READ | EV_PERSIST, on_ready, n), e);
}

void net_unwatch(net *n, int fd)
{
    for (int i = n->n_watched - 1; i >= 0; i--) {
        struct event *event = n->watched[i];
        if (event_get_fd(event) != fd) continue;
        if (event_get_events(event) & EV_SIGNAL) continue; /* fd is the signal's number */
        event_free(event);
        n->watched[i] = n->watched[--n->n_watched];
    }
    int kept = 0;
    for (int i = 0; i < n->n_events; i++)
        if (n->events[i].kind != NET_READY || n->events[i].fd != fd)
            n->events[kept++] = n->events[i];
    n->n_events = kept;
}

/* Without EV_PERSIST libevent restores the handler that it found when the loop sees the signal:
 * that is to be the default one, whoever caught the signal before. A second one ends the process
 * also where the loop does not come round to the first, hence SA_RESETHAND. */
err_code net_catch_signal(net *n, int number, err_info *e)
{
    const struct sigaction by_default = {.sa_handler = SIG_DFL};
    struct sigaction old;
    if (number == SIGHUP && sigaction(number, NULL, &old) == 0 && old.sa_handler == SIG_IGN)
        return ERR_NONE;
    if (sigaction(number, &by_default, NULL) != 0)
        return err_set(e, ERR_IO, "cannot catch signal %d: %s", number, strerror(errno));
    err_code code = watch(n, event_new(n->base, number, EV_SIGNAL, on_signal, n), e);
    if (code) return code;
    struct sigaction caught;
    if (sigaction(number, NULL, &caught) != 0) return ERR_NONE;
    caught.sa_flags |= (int)SA_RESETHAND;
    sigaction(number, &caught, NULL);
    return ERR_NONE;
}
