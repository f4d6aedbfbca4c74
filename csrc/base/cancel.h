/* cancel: how long work hears that it should stop. */
#ifndef BASE_CANCEL_H
#define BASE_CANCEL_H

#include <stdatomic.h>
#include <stdint.h>

/* Raised from anywhere (a signal handler, another thread); read between blocks of work.
 * NULL means "never". A flag of -n is raised by the n-th look at it, so that specs can interrupt a
 * computation wherever it looks. */
typedef atomic_int cancel_flag;

static inline int cancel_raised(const cancel_flag *c)
{
    if (!c) return 0;
    cancel_flag *flag = (cancel_flag *)(uintptr_t)c;
    int now = atomic_load_explicit(flag, memory_order_relaxed);
    while (now < 0 &&
           !atomic_compare_exchange_weak_explicit(flag, &now, now == -1 ? 1 : now + 1,
                                                  memory_order_relaxed, memory_order_relaxed))
        ;
    return now > 0 || now == -1;
}

#endif
