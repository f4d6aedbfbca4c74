/* The table of one instruction set. Included last by avx2.c and avx512.c. */
#include "kern/bf16.h"
#include "kern/int8.h"
#include "kern/vector_attn.h"
#include "kern/vector_bf16.h"
#include "kern/vector_delta.h"
#include "kern/vector_int_attn.h"
#include "kern/vector_math.h"
#include "kern/vector_matrix.h"

#define V16_TABLE(name_, level_, int8_, bf16_)                                                     \
    {                                                                                              \
        .name = name_, .level = level_,                                                            \
        .decode = {decode, decode, decode, decode, decode, decode, decode, decode},                \
        .product = product_any, .dots = dots, .rms_norm = rms_norm, .l2_norm = l2_norm,            \
        .silu = silu, .silu_mul = silu_mul, .sigmoid_mul = sigmoid_mul, .axpy = axpy,              \
        .softmax = softmax, .conv_silu = conv_silu, .delta_rule = delta_rule, .attend = attend,    \
        .axpby = axpby, .f16_encode = f16_encode, .f16_decode = f16_decode, .int8 = &int8_,        \
        .bf16 = &bf16_, .attn = &int_attn_ops, .fit = &V16_FIT, .row = &V16_ROW,                   \
    }
