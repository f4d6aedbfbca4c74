/* Jobs: evaluations in the background, for scripts that serve others meanwhile. A model runs one at
 * a time; until its end has been seen, every other use of the model and its sessions raises. */
#include "lua/lmodel.h"

#include <string.h>

#include "base/worker.h"

#define LJOB_CLASS "moonlet.core.job"

typedef struct job_box {
    model_box *owner;
    const ses_part *parts; /* in the user value, with all they borrow */
    int n_parts;
    cancel_flag cancel;
    err_info error;
    int is_running; /* until its end has been seen */
} job_box;

static void run(void *ctx)
{
    job_box *job = ctx;
    ses_eval_parts(job->parts, job->n_parts, &job->cancel, &job->error);
}

static void take_end(job_box *job)
{
    worker_wait(job->owner->worker);
    job->owner->job = NULL;
    job->is_running = 0;
}

void ljob_end(model_box *box)
{
    if (!box->job) return;
    atomic_store(&box->job->cancel, 1);
    take_end(box->job);
}

int ljob_start(lua_State *L)
{
    int n;
    err_info e = {0};
    model_box *owner = lmodel_check(L, 1);
    lsession_check_parts(L, 2, owner, &n);
    int kept = lua_gettop(L);
    lua_pushvalue(L, 1);
    lua_rawseti(L, kept, 3 * n + 2);
    job_box *job = lua_newuserdatauv(L, sizeof *job, 1);
    *job = (job_box){.owner = owner, .n_parts = n};
    luaL_setmetatable(L, LJOB_CLASS);
    lua_pushvalue(L, kept);
    lua_setiuservalue(L, -2, 1);

    /* A finalizer may have closed one meanwhile: looked at again, with no allocation behind it. */
    lmodel_check(L, 1);
    for (int i = 0; i < n; i++) {
        lua_rawgeti(L, kept, 3 * i + 2);
        if (!*(ses **)lua_touserdata(L, -1)) luaL_error(L, "closed session");
        lua_pop(L, 1);
    }
    lua_rawgeti(L, kept, 3 * n + 1);
    job->parts = lua_touserdata(L, -1);
    lua_pop(L, 1);
    if (!owner->worker && !(owner->worker = worker_open(&e))) return lml_fail(L, &e);
    job->is_running = 1;
    owner->job = job;
    worker_start(owner->worker, run, job);
    return 1;
}

static job_box *check_job(lua_State *L)
{
    return luaL_checkudata(L, 1, LJOB_CLASS);
}

/* job:fd() -> descriptor that can be read once the job is done */
static int fd(lua_State *L)
{
    job_box *job = check_job(L);
    if (!job->is_running) return luaL_error(L, "the job has ended");
    lua_pushinteger(L, worker_fd(job->owner->worker));
    return 1;
}

/* The script has been told. Where something else ended the job (a closed session), the descriptor
 * was left readable, or whoever waits for it would wait for ever. */
static void see_end(job_box *job)
{
    if (job->is_running) take_end(job);
    if (job->owner->worker && !job->owner->job) worker_is_idle(job->owner->worker);
}

/* job:is_done() -> boolean */
static int is_done(lua_State *L)
{
    job_box *job = check_job(L);
    if (!job->is_running || worker_is_idle(job->owner->worker)) see_end(job);
    lua_pushboolean(L, !job->is_running);
    return 1;
}

/* job:result() -> true, or nil, message, code; waits for the end */
static int result(lua_State *L)
{
    job_box *job = check_job(L);
    see_end(job);
    if (job->error.code) return lml_fail(L, &job->error);
    lua_pushboolean(L, 1);
    return 1;
}

/* job:cancel(): its sessions will be as they were, unless it has gone too far to stop */
static int cancel(lua_State *L)
{
    atomic_store(&check_job(L)->cancel, 1);
    return 0;
}

static int close_job(lua_State *L)
{
    job_box *job = check_job(L);
    if (job->is_running) ljob_end(job->owner);
    return 0;
}

void ljob_open(lua_State *L)
{
    static const luaL_Reg methods[] = {
        {"cancel", cancel},   {"close", close_job}, {"fd", fd},
        {"is_done", is_done}, {"result", result},   {NULL, NULL},
    };
    lml_class(L, LJOB_CLASS, methods, close_job);
}
