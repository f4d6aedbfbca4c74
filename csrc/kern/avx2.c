/* The vector kernels for this instruction set; the build adds its compiler flags to this file. */
#include "kern/v16_avx2.h"

#include "kern/vector_table.h"

const kern_ops kern_avx2 = V16_TABLE("avx2", CPU_AVX2, kern_avx2_int8, bf16_ops);
