/* The vector kernels for this instruction set; the build adds its compiler flags to this file. */
#include "kern/v16_avx512.h"

#include "kern/vector_table.h"
