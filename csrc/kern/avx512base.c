/* The vector kernels for AVX-512 as Skylake-X has it, which is not meant for bytes: products of
 * them are those of AVX2. */
#include "kern/v16_avx512.h"

#include "kern/vector_table.h"

const kern_ops kern_avx512base = V16_TABLE("avx512base", CPU_AVX512_BASE, kern_avx2_int8, bf16_ops);
