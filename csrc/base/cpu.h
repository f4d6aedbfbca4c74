/* cpu: what this processor and its kernel let us use. */
#ifndef BASE_CPU_H
#define BASE_CPU_H

typedef enum cpu_level { CPU_SCALAR, CPU_AVX2, CPU_AVX512, CPU_AMX, CPU_N_LEVELS } cpu_level;

/* The best level that both the processor and the operating system support. AVX2 stands for
 * AVX2 + FMA + F16C; AVX-512 for F, BW, VL, DQ, VNNI and VBMI: Ice Lake and Zen 4 on; AMX for these
 * and tiles of bytes, Sapphire Rapids on, which the first call asks the kernel for. */
cpu_level cpu_detect(void);

/* "scalar", "avx2", "avx512", "amx" */
const char *cpu_level_name(cpu_level level);

/* Processors this process may run on (its affinity mask), from 1 to 1024: a pool of all of them can
 * always be opened. */
int cpu_count(void);

#endif
