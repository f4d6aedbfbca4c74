/* cancel: how long work hears that it should stop. */
#ifndef BASE_CANCEL_H
#define BASE_CANCEL_H

#include <stdatomic.h>
#include <stdint.h>

/* Raised from anywhere (a signal handler, another thread); read between blocks of work.
 * NULL means "never". */
typedef atomic_int cancel_flag;

static inline int cancel_raised(const cancel_flag *c)
{
    return c && atomic_load_explicit((cancel_flag *)(uintptr_t)c, memory_order_relaxed) != 0;
}

#endif
