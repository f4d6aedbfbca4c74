/* The vector kernels for this instruction set; the build adds its compiler flags to this file. */
#include "kern/v16_avx512.h"

#include "kern/vector_table.h"

/* Only products of bytes want more than VNNI. */
const kern_ops kern_avx512vnni =
    V16_TABLE("avx512vnni", CPU_AVX512_VNNI, kern_avx512vnni_int8, bf16_ops);
void kern_avx512_scales(const num_matrix *w, int64_t row, int64_t n_rows, float *out)
{
    bf16_scales_of(w, row, n_rows, out);
}

const kern_ops kern_avx512 = V16_TABLE("avx512", CPU_AVX512, kern_avx512_int8, bf16_ops);
const kern_ops kern_avx512bf16 =
    V16_TABLE("avx512bf16", CPU_AVX512_BF16, kern_avx512_int8, kern_avx512_bf16);
const kern_ops kern_amx = V16_TABLE("amx", CPU_AMX, kern_amx_int8, bf16_ops);
