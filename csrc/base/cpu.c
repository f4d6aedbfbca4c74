#include "base/cpu.h"

#include <sched.h>
#include <unistd.h>

#if defined(__x86_64__) && !defined(MOONLET_SCALAR_ONLY)
#include <cpuid.h>

/* clang's __builtin_cpu_supports knows no F16C before version 17. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

/* The builtin says yes to an AVX level only when the operating system saves its registers (it reads
 * XCR0, in gcc and in clang); F16C uses those of AVX2. */
cpu_level cpu_detect(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
        return CPU_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vbmi"))
        return CPU_AVX2;
    return CPU_AVX512;
}
#else
cpu_level cpu_detect(void)
{
    return CPU_SCALAR;
}
#endif

const char *cpu_level_name(cpu_level level)
{
    static const char *const names[CPU_N_LEVELS] = {"scalar", "avx2", "avx512", "amx"};
    return (unsigned)level < CPU_N_LEVELS ? names[level] : "unknown";
}

int cpu_count(void)
{
    cpu_set_t set; /* too small for the kernel's mask on machines with more than 1024 processors */
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                        : (int)sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n < CPU_SETSIZE ? n : CPU_SETSIZE;
}
