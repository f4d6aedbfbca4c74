#include "kern/kern_const.h"

/* Rising by level; the last usable one is the best. */
static const kern_ops *const tables[] = {
    &kern_scalar,
#ifndef MOONLET_SCALAR_ONLY
    &kern_avx2,   &kern_avx512base, &kern_avx512vnni, &kern_avx512, &kern_avx512bf16, &kern_amx,
#endif
};

int kern_count(void)
{
    cpu_level here = cpu_detect();
    int n = (int)(sizeof tables / sizeof *tables);
    while (n > 1 && tables[n - 1]->level > here) n--;
    return n;
}

const kern_ops *kern_at(int i)
{
    return tables[i];
}

const kern_ops *kern_select(cpu_level level)
{
    int i = kern_count() - 1;
    while (i > 0 && tables[i]->level > level) i--;
    return tables[i];
}
