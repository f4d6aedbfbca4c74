#include "base/secret.h"

int secret_same(const void *a, size_t n_a, const void *b, size_t n_b)
{
    const volatile unsigned char *x = a, *y = b; /* volatile: no early end by the compiler */
    unsigned difference = n_a != n_b;
    for (size_t i = 0; i < n_a; i++) difference |= (unsigned)(x[i] ^ (n_b ? y[i % n_b] : 0));
    return difference == 0;
}
