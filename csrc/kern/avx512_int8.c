/* The products of int8.h where there is VBMI; the build adds its compiler flags to this file. */
#define INT8_TABLE kern_avx512_int8
#include "kern/int8_vnni512.h"
