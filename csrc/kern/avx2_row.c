/* Rows for this instruction set; the build adds its compiler flags to this file. */
#include "kern/row_plain.h"

const kern_row_ops kern_avx2_row = KERN_ROW_OPS;
