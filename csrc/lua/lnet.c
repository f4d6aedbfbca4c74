/* The event loop and HTTP server: what arrives is asked for, nothing calls back into Lua. */
#include "lua/lml.h"

#include <signal.h>
#include <string.h>

#include "net/net.h"

#define LNET_CLASS     "moonlet.core.net"
#define LREQUEST_CLASS "moonlet.core.request"

enum { MAX_FIELDS = 64 };

typedef struct net_box {
    net *n; /* NULL when closed */
} net_box;

typedef struct request_box {
    net_request *r; /* NULL when closed */
} request_box;

static net *check_net(lua_State *L)
{
    net_box *box = luaL_checkudata(L, 1, LNET_CLASS);
    if (!box->n) luaL_error(L, "closed net");
    return box->n;
}

static int close_net(lua_State *L)
{
    net_box *box = luaL_checkudata(L, 1, LNET_CLASS);
    net_close(box->n);
    box->n = NULL;
    return 0;
}

/* core.net_open{header_bytes=, body_bytes=, total_bytes=, pending_bytes=, connections=,
 * grace_seconds=, idle_seconds=, request_seconds=, write_seconds=} -> net; see net_limits */
static int open_net(lua_State *L)
{
    static const char *const keys[] = {
        "header_bytes",  "body_bytes",   "total_bytes",     "pending_bytes", "connections",
        "grace_seconds", "idle_seconds", "request_seconds", "write_seconds", NULL};
    lml_check_keys(L, 1, keys);
    net_limits limits = {
        .header_bytes = lml_opt_int(L, 1, "header_bytes", 0),
        .body_bytes = lml_opt_int(L, 1, "body_bytes", 0),
        .total_bytes = lml_opt_int(L, 1, "total_bytes", 0),
        .pending_bytes = lml_opt_int(L, 1, "pending_bytes", 0),
        .connections = (int)lml_opt_int(L, 1, "connections", 0),
        .grace_seconds = lml_opt_number(L, 1, "grace_seconds", 0),
        .idle_seconds = lml_opt_number(L, 1, "idle_seconds", 0),
        .request_seconds = lml_opt_number(L, 1, "request_seconds", 0),
        .write_seconds = lml_opt_number(L, 1, "write_seconds", 0),
    };
    net_box *box = lua_newuserdatauv(L, sizeof *box, 1);
    box->n = NULL;
    luaL_setmetatable(L, LNET_CLASS);
    lua_newtable(L); /* requests by address, as long as somebody has them */
    lua_createtable(L, 0, 1);
    lua_pushliteral(L, "v");
    lua_setfield(L, -2, "__mode");
    lua_setmetatable(L, -2);
    lua_setiuservalue(L, -2, 1);
    err_info e;
    box->n = net_open(&limits, &e);
    return box->n ? 1 : lml_fail(L, &e);
}

/* net:set_error_form(content_type, before, after, after_failure) -> true; see net_set_error_form */
static int set_error_form(lua_State *L)
{
    err_info e;
    const char *type = luaL_checkstring(L, 2), *before = luaL_checkstring(L, 3),
               *after = luaL_checkstring(L, 4), *after_failure = luaL_checkstring(L, 5);
    if (net_set_error_form(check_net(L), type, before, after, after_failure, &e))
        return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* net:listen(host, port) -> port; 0 takes a free one */
static int listen_at(lua_State *L)
{
    const char *host = luaL_checkstring(L, 2);
    lua_Integer port = luaL_checkinteger(L, 3);
    luaL_argcheck(L, port >= 0 && port <= 65535, 3, "0 to 65535 expected");
    err_info e;
    int got = net_listen(check_net(L), host, (int)port, &e);
    if (got < 0) return lml_fail(L, &e);
    lua_pushinteger(L, got);
    return 1;
}

static int stop_listening(lua_State *L)
{
    net_stop_listening(check_net(L));
    return 0;
}

static int n_connections(lua_State *L)
{
    lua_pushinteger(L, net_n_connections(check_net(L)));
    return 1;
}

/* net:unsent() -> bytes of replies that wait for their clients */
static int unsent(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)net_unsent(check_net(L)));
    return 1;
}

/* The userdata of a request, made when it is first seen. */
static void push_request(lua_State *L, net_request *r, int is_new)
{
    lua_getiuservalue(L, 1, 1);
    if (is_new) {
        request_box *box = lua_newuserdatauv(L, sizeof *box, 1);
        box->r = r;
        luaL_setmetatable(L, LREQUEST_CLASS);
        lua_pushvalue(L, 1);
        lua_setiuservalue(L, -2, 1); /* the net outlives its requests */
        lua_pushvalue(L, -1);
        lua_rawsetp(L, -3, r);
    } else {
        lua_rawgetp(L, -1, r);
    }
}

/* net:wait(seconds) -> "request", request | "gone", request | "half", request | "ready", fd |
 * "signal", number, or nothing when the time is over; waits for ever without seconds */
static int wait(lua_State *L)
{
    double seconds = luaL_optnumber(L, 2, -1);
    net_event event;
    err_info e;
    if (net_wait(check_net(L), seconds, &event, &e)) return lml_fail(L, &e);
    switch (event.kind) {
    case NET_NONE: return 0;
    case NET_REQUEST:
        lua_pushliteral(L, "request");
        push_request(L, event.request, 1);
        break;
    case NET_GONE:
        lua_pushliteral(L, "gone");
        push_request(L, event.request, 0);
        break;
    case NET_HALF:
        lua_pushliteral(L, "half");
        push_request(L, event.request, 0);
        break;
    case NET_READY:
        lua_pushliteral(L, "ready");
        lua_pushinteger(L, event.fd);
        return 2;
    case NET_SIGNAL:
        lua_pushliteral(L, "signal");
        lua_pushinteger(L, event.fd);
        return 2;
    }
    lua_remove(L, -2);
    return 2;
}

/* net:watch(fd) -> true */
static int watch(lua_State *L)
{
    int fd = (int)luaL_checkinteger(L, 2);
    err_info e;
    if (net_watch(check_net(L), fd, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

static int unwatch(lua_State *L)
{
    int fd = (int)luaL_checkinteger(L, 2);
    net_unwatch(check_net(L), fd);
    return 0;
}

/* net:catch_signal("INT"|"TERM"|"HUP") -> true */
static int catch_signal(lua_State *L)
{
    static const char *const names[] = {"INT", "TERM", "HUP", NULL};
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    int which = luaL_checkoption(L, 2, NULL, names);
    err_info e;
    if (net_catch_signal(check_net(L), numbers[which], &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

/* ---- requests ------------------------------------------------------------------------------ */

static net_request *check_request(lua_State *L)
{
    request_box *box = luaL_checkudata(L, 1, LREQUEST_CLASS);
    if (!box->r) luaL_error(L, "closed request");
    return box->r;
}

static int close_request(lua_State *L)
{
    request_box *box = luaL_checkudata(L, 1, LREQUEST_CLASS);
    net_request_free(box->r);
    box->r = NULL;
    return 0;
}

static int method(lua_State *L)
{
    lua_pushstring(L, net_method(check_request(L)));
    return 1;
}

static int target(lua_State *L)
{
    lua_pushstring(L, net_target(check_request(L)));
    return 1;
}

static int peer(lua_State *L)
{
    lua_pushstring(L, net_peer(check_request(L)));
    return 1;
}

/* request:header(name) -> text or nil */
static int header(lua_State *L)
{
    const char *name = luaL_checkstring(L, 2);
    lua_pushstring(L, net_header(check_request(L), name));
    return 1;
}

/* request:body() -> bytes, nil when the client has left */
static int body(lua_State *L)
{
    size_t n;
    const void *bytes = net_body(check_request(L), &n);
    if (bytes)
        lua_pushlstring(L, bytes, n);
    else
        lua_pushnil(L);
    return 1;
}

/* request:body_bytes() -> their number */
static int body_bytes(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)net_body_bytes(check_request(L)));
    return 1;
}

/* request:drop_body(): it has been looked at */
static int drop_body(lua_State *L)
{
    net_drop_body(check_request(L));
    return 0;
}

/* request:pending() -> bytes of the reply that wait for the client */
static int pending(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)net_pending(check_request(L)));
    return 1;
}

/* request:probe(): see net_probe */
static int probe(lua_State *L)
{
    net_probe(check_request(L));
    return 0;
}

static int is_over(lua_State *L)
{
    lua_pushboolean(L, net_is_over(check_request(L)));
    return 1;
}

/* The table {name = value} at `arg`, which keeps the strings alive; nil has no fields. */
static int read_fields(lua_State *L, int arg, net_field *fields)
{
    int n = 0;
    if (lua_isnoneornil(L, arg)) return 0;
    luaL_checktype(L, arg, LUA_TTABLE);
    for (lua_pushnil(L); lua_next(L, arg); lua_pop(L, 1)) {
        if (lua_type(L, -2) != LUA_TSTRING || lua_type(L, -1) != LUA_TSTRING)
            luaL_error(L, "header fields: names and values are strings");
        if (n == MAX_FIELDS) luaL_error(L, "more than %d header fields", MAX_FIELDS);
        fields[n++] = (net_field){lua_tostring(L, -2), lua_tostring(L, -1)};
    }
    return n;
}

static int check_status(lua_State *L)
{
    lua_Integer status = luaL_checkinteger(L, 2);
    luaL_argcheck(L, status >= 100 && status <= 999, 2, "a status code expected");
    return (int)status;
}

/* request:start(status, fields) begins a streamed reply */
static int start(lua_State *L)
{
    net_field fields[MAX_FIELDS];
    int status = check_status(L), n = read_fields(L, 3, fields);
    net_start(check_request(L), status, fields, n);
    return 0;
}

/* request:write(bytes) -> true, or nil, message, code when the client does not read */
static int write_piece(lua_State *L)
{
    size_t n;
    const char *bytes = luaL_checklstring(L, 2, &n);
    err_info e;
    if (net_write(check_request(L), bytes, n, &e)) return lml_fail(L, &e);
    lua_pushboolean(L, 1);
    return 1;
}

static int finish(lua_State *L)
{
    net_finish(check_request(L));
    return 0;
}

/* request:reply(status, fields, bytes) */
static int reply(lua_State *L)
{
    net_field fields[MAX_FIELDS];
    size_t n_bytes;
    int status = check_status(L), n = read_fields(L, 3, fields);
    const char *bytes = luaL_optlstring(L, 4, "", &n_bytes);
    net_reply(check_request(L), status, fields, n, bytes, n_bytes);
    return 0;
}

void lml_open_net(lua_State *L)
{
    static const luaL_Reg net_methods[] = {
        {"catch_signal", catch_signal},
        {"close", close_net},
        {"listen", listen_at},
        {"n_connections", n_connections},
        {"set_error_form", set_error_form},
        {"stop_listening", stop_listening},
        {"unsent", unsent},
        {"unwatch", unwatch},
        {"wait", wait},
        {"watch", watch},
        {NULL, NULL},
    };
    static const luaL_Reg request_methods[] = {
        {"body", body},           {"body_bytes", body_bytes},
        {"close", close_request}, {"drop_body", drop_body},
        {"finish", finish},       {"header", header},
        {"is_over", is_over},     {"method", method},
        {"peer", peer},           {"pending", pending},
        {"probe", probe},         {"reply", reply},
        {"start", start},         {"target", target},
        {"write", write_piece},   {NULL, NULL},
    };
    lml_class(L, LNET_CLASS, net_methods, close_net);
    lml_class(L, LREQUEST_CLASS, request_methods, close_request);
    lua_pushcfunction(L, open_net);
    lua_setfield(L, -2, "net_open");
}
