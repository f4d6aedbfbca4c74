/* cpu: what this processor and its kernel let us use. */
#ifndef BASE_CPU_H
#define BASE_CPU_H

/* Each has what those before it have. */
typedef enum cpu_level {
    CPU_SCALAR,
    CPU_AVX2,        /* and FMA and F16C */
    CPU_AVX512_BASE, /* F, BW, VL and DQ: Skylake-X */
    CPU_AVX512_VNNI, /* Cascade Lake */
    CPU_AVX512,      /* VBMI: Ice Lake */
    CPU_AVX512_BF16, /* Zen 4 */
    CPU_AMX,         /* tiles of bytes: Sapphire Rapids */
    CPU_N_LEVELS
} cpu_level;

/* The best level that both the processor and the operating system support. Linux is asked for the
 * use of tiles. */
cpu_level cpu_detect(void);

/* "scalar", "avx2", "avx512base", "avx512vnni", "avx512", "avx512bf16", "amx" */
const char *cpu_level_name(cpu_level level);

/* Processors this process may run on (its affinity mask), from 1 to 1024: a pool of all of them can
 * always be opened. */
int cpu_count(void);

#endif
