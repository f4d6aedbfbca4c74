#include "base/cpu.h"

#include <sched.h>
#include <unistd.h>

#if defined(__x86_64__) && !defined(MOONLET_SCALAR_ONLY)
#include <cpuid.h>
#include <sys/syscall.h>

/* clang's __builtin_cpu_supports knows no F16C before version 17. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

/* Whether there are tiles with products of bytes, and Linux saves them when threads are switched:
 * for that it wants to be asked (Documentation/arch/x86/xstate.rst). The answer holds for the
 * process and what it starts later; asking again changes nothing. */
static int has_tiles(void)
{
    enum { TILE = 1 << 24, INT8 = 1 << 25, XCR0_TILES = 3 << 17 };
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d, xcr0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILE) || !(d & INT8)) return 0;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(d) : "c"(0));
    return (xcr0 & XCR0_TILES) == XCR0_TILES &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* The builtin says yes to an AVX level only when the operating system saves its registers (it reads
 * XCR0, in gcc and in clang); F16C uses those of AVX2. */
cpu_level cpu_detect(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
        return CPU_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return CPU_AVX2;
    if (!__builtin_cpu_supports("avx512vnni")) return CPU_AVX512_BASE;
    if (!__builtin_cpu_supports("avx512vbmi")) return CPU_AVX512_VNNI;
    if (!__builtin_cpu_supports("avx512bf16")) return CPU_AVX512;
    return has_tiles() ? CPU_AMX : CPU_AVX512_BF16;
}
#else
cpu_level cpu_detect(void)
{
    return CPU_SCALAR;
}
#endif

const char *cpu_level_name(cpu_level level)
{
    static const char *const names[CPU_N_LEVELS] = {
        "scalar", "avx2", "avx512base", "avx512vnni", "avx512", "avx512bf16", "amx"};
    return (unsigned)level < CPU_N_LEVELS ? names[level] : "unknown";
}

int cpu_count(void)
{
    cpu_set_t set; /* too small for the kernel's mask on machines with more than 1024 processors */
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                        : (int)sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n < CPU_SETSIZE ? n : CPU_SETSIZE;
}
