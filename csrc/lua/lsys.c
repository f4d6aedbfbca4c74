/* The process around the interpreter: interrupts. */
#include "lua/lml.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/heap.h"
#include "base/process.h"
#include "base/secret.h"

/* A signal handler can reach nothing but globals: the mutable globals of moonlet. */
static cancel_flag interrupted;
static process_list programs;

cancel_flag *lml_cancel_flag(void)
{
    return &interrupted;
}

process_list *lml_programs(void)
{
    return &programs;
}

/* What has been raised: Ctrl-C, which asks for the end of a computation; signals that ask for the
 * end of the process, each for itself, as some who end programs send one after the other. */
enum { BY_USER = 1, TERMINATED = 2, HUNG_UP = 4 };

/* A second signal of a kind ends the process, and what runs beside it. */
static void on_interrupt(int signal_number)
{
    int kind = signal_number == SIGINT ? BY_USER : signal_number == SIGTERM ? TERMINATED : HUNG_UP;
    if (!(atomic_fetch_or(&interrupted, kind) & kind)) return;
    process_kill_listed(&programs);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static void ignore(int signal_number)
{
    (void)signal_number;
}

/* A write beyond `ulimit -f` is to fail as one on a full disk does, instead of killing the process
 * without a word. With a handler, as programs that are started would inherit SIG_IGN. */
static int outlive_file_limit(void)
{
    struct sigaction action = {.sa_handler = ignore, .sa_flags = SA_RESTART}, old;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGXFSZ, NULL, &old) != 0) return -1;
    return old.sa_handler == SIG_DFL ? sigaction(SIGXFSZ, &action, NULL) : 0;
}

/* core.catch_interrupt(): from now on Ctrl-C stops computations, which then fail with "cancelled",
 * instead of killing the process at once; so do SIGTERM and SIGHUP, and those stop what begins
 * later as well. Writing too large a file fails, too. */
static int catch_interrupt(lua_State *L)
{
    /* A read that waits for the user is not restarted, so that it returns at the first signal. */
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action = {.sa_handler = on_interrupt}, old;
    sigemptyset(&action.sa_mask);
    atomic_fetch_and(&interrupted, ~BY_USER);
    if (outlive_file_limit() != 0) return luaL_error(L, "cannot catch signals");
    for (int i = 0; i < 3; i++) {
        /* nohup's programs outlive their terminal. */
        if (numbers[i] == SIGHUP && sigaction(SIGHUP, NULL, &old) == 0 && old.sa_handler == SIG_IGN)
            continue;
        if (sigaction(numbers[i], &action, NULL) != 0)
            return luaL_error(L, "cannot catch interrupts");
    }
    return 0;
}

/* core.interrupted() -> boolean */
static int was_interrupted(lua_State *L)
{
    lua_pushboolean(L, cancel_raised(&interrupted));
    return 1;
}

/* core.wait_input(fd) -> true when fd can be read, or nil, message, code. The wait is cut into
 * pieces because an interrupt may arrive just before poll() begins. */
static int wait_input(lua_State *L)
{
    enum { PIECE_MS = 100 };
    struct pollfd input = {.fd = (int)luaL_checkinteger(L, 1), .events = POLLIN};
    err_info e = {0};
    int n = 0;
    while (n == 0 && !cancel_raised(&interrupted)) {
        n = poll(&input, 1, PIECE_MS);
        if (n < 0 && errno == EINTR) n = 0;
    }
    if (n > 0) {
        lua_pushboolean(L, 1);
        return 1;
    }
    if (n == 0) err_set(&e, ERR_CANCELLED, "interrupted");
    if (n < 0) err_set(&e, ERR_IO, "cannot wait for input: %s", strerror(errno));
    return lml_fail(L, &e);
}

/* core.isatty(fd) -> boolean */
static int is_terminal(lua_State *L)
{
    lua_pushboolean(L, isatty((int)luaL_checkinteger(L, 1)));
    return 1;
}

/* core.keep_little_heap(): see heap_keep_little */
static int keep_little_heap(lua_State *L)
{
    (void)L;
    heap_keep_little();
    return 0;
}

/* core.give_back_heap(): see heap_give_back */
static int give_back_heap(lua_State *L)
{
    (void)L;
    heap_give_back();
    return 0;
}

/* core.seconds() -> monotonic time */
static int seconds(lua_State *L)
{
    lua_pushnumber(L, clock_seconds());
    return 1;
}

/* core.same_secret(a, b) -> boolean, in a time that depends on the lengths only */
static int same_secret(lua_State *L)
{
    size_t n_a, n_b;
    const char *a = luaL_checklstring(L, 1, &n_a), *b = luaL_checklstring(L, 2, &n_b);
    lua_pushboolean(L, secret_same(a, n_a, b, n_b));
    return 1;
}

void lml_open_sys(lua_State *L)
{
    static const luaL_Reg functions[] = {{"catch_interrupt", catch_interrupt},
                                         {"give_back_heap", give_back_heap},
                                         {"interrupted", was_interrupted},
                                         {"isatty", is_terminal},
                                         {"keep_little_heap", keep_little_heap},
                                         {"same_secret", same_secret},
                                         {"seconds", seconds},
                                         {"wait_input", wait_input},
                                         {NULL, NULL}};
    luaL_setfuncs(L, functions, 0);
}
