#include "num/fp.h"

uint8_t fp_e4m3_encode(float x)
{
    uint32_t u = fp_bits(x), a = u & 0x7fffffffu;
    uint8_t sign = (uint8_t)(u >> 24 & 0x80);
    if (a >= fp_bits(448.0f)) return sign | 0x7e;
    if (a < fp_bits(0x1p-6f)) { /* subnormal: the f32 adder rounds at 2^-9 */
        float r = fp_from_bits(a) + 0x1p14f;
        return sign | (uint8_t)(fp_bits(r) - fp_bits(0x1p14f));
    }
    a += 0x7ffff + (a >> 20 & 1);                    /* nearest even at the third mantissa bit */
    return sign | (uint8_t)((a >> 20) - (120 << 3)); /* exponent bias 127 to 7 */
}
