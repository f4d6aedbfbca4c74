/* The products of int8.h where there is VNNI without VBMI: Cascade Lake and Cooper Lake. */
#define INT8_TABLE kern_avx512vnni_int8
#include "kern/int8_vnni512.h"
