/* fp: the small floating-point formats, one value at a time.
 *
 * Pure and inline; the definition that every vector kernel is compared with.
 *   bf16  upper half of an f32                    f16   IEEE binary16
 *   E4M3  sign 1, exponent 4 (bias 7), mantissa 3, no infinity, 0x7f/0xff NaN, max 448
 *   E8M0  2^(byte - 127), 255 = NaN               E2M1  0 .5 1 1.5 2 3 4 6 and negatives
 * Source: OCP Microscaling Formats v1.0 and OCP FP8; encoders round to nearest even and
 * saturate, as MLX does. */
#ifndef NUM_FP_H
#define NUM_FP_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float fp_from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint32_t fp_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float fp_bf16_decode(uint16_t h)
{
    return fp_from_bits((uint32_t)h << 16);
}

static inline uint16_t fp_bf16_encode(float f)
{
    uint32_t u = fp_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40); /* quiet NaN */
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float fp_f16_decode(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 0x3ff;
    if (exp == 31) return fp_from_bits(sign | 0x7f800000u | (man << 13));
    if (exp) return fp_from_bits(sign | ((exp + 112) << 23) | (man << 13));
    float f = (float)man * 0x1p-24f;
    return sign ? -f : f;
}

/* Rounds to nearest even; overflow becomes infinity as in IEEE. */
static inline uint16_t fp_f16_encode(float f)
{
    uint32_t u = fp_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | ((a >> 13) & 0x3ff));
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000u) { /* subnormal: let the f32 adder round at 2^-24 */
        float r = fp_from_bits(a) + 0x1p-1f;
        return (uint16_t)(sign | (fp_bits(r) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((a - 0x38000000u + 0xfff + ((a >> 13) & 1)) >> 13));
}

static inline float fp_e4m3_decode(uint8_t b)
{
    uint32_t exp = (b >> 3) & 15, man = b & 7;
    if ((b & 0x7f) == 0x7f) return NAN;
    float f = exp ? fp_from_bits((exp + 120) << 23 | man << 20) : (float)man * 0x1p-9f;
    return b & 0x80 ? -f : f;
}

static inline float fp_e8m0_decode(uint8_t b)
{
    if (b == 255) return NAN;
    return b ? fp_from_bits((uint32_t)b << 23) : 0x1p-127f;
}

static inline float fp_e2m1_decode(uint8_t code)
{
    static const float table[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    return table[code & 15];
}

/* |x| >= 448, infinities and NaN become 448 with x's sign. */
uint8_t fp_e4m3_encode(float x);

#endif
