/* What the module's own code asks the C library for, counted; linked into the module that specs
 * load from build/counted. The linker hands those calls to the functions here, and Lua's way into
 * the base room too, which learns to tell: core.allocations() -> calls so far. Memory of Lua's
 * objects comes from the program that runs Lua, and is not among them. */
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "lua/lml.h"

static atomic_llong n_calls;

void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void *__real_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
void __real_lml_open_base(lua_State *L);

void *__wrap_malloc(size_t size)
{
    atomic_fetch_add(&n_calls, 1);
    return __real_malloc(size);
}

void *__wrap_calloc(size_t n, size_t size)
{
    atomic_fetch_add(&n_calls, 1);
    return __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t size)
{
    atomic_fetch_add(&n_calls, 1);
    return __real_realloc(p, size);
}

void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    atomic_fetch_add(&n_calls, 1);
    return __real_aligned_alloc(alignment, size);
}

void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    atomic_fetch_add(&n_calls, 1);
    return __real_mmap(at, size, protection, flags, fd, offset);
}

static int allocations(lua_State *L)
{
    lua_pushinteger(L, atomic_load(&n_calls));
    return 1;
}

void __wrap_lml_open_base(lua_State *L)
{
    __real_lml_open_base(L);
    lua_pushcfunction(L, allocations);
    lua_setfield(L, -2, "allocations");
}
