#include "base/cpu.h"

#include <sched.h>

cpu_level cpu_detect(void)
{
#if defined(__x86_64__) && !defined(MOONLET_SCALAR_ONLY)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
        return CPU_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return CPU_AVX2;
    return CPU_AVX512;
#else
    return CPU_SCALAR;
#endif
}

const char *cpu_level_name(cpu_level level)
{
    static const char *const names[CPU_N_LEVELS] = {"scalar", "avx2", "avx512", "amx"};
    return (unsigned)level < CPU_N_LEVELS ? names[level] : "unknown";
}

int cpu_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    int n = CPU_COUNT(&set);
    return n > 0 ? n : 1;
}
