/* Packed codes into a register, for both vector instruction sets. Included after v16_*.h. */
#ifndef KERN_VECTOR_CODES_H
#define KERN_VECTOR_CODES_H

#include <string.h>

/* The 2 * bits bytes of 16 codes; what is behind them in the register is zero. */
V16_FN __m128i load_codes(const uint8_t *p, int bits)
{
    uint16_t u16;
    uint32_t u32;
    switch (bits) {
    case 2: memcpy(&u32, p, 4); return _mm_cvtsi32_si128((int)u32);
    case 3:
        memcpy(&u32, p, 4);
        memcpy(&u16, p + 4, 2);
        return _mm_insert_epi16(_mm_cvtsi32_si128((int)u32), u16, 2);
    case 4: return _mm_loadl_epi64((const void *)p);
    case 5:
        memcpy(&u16, p + 8, 2);
        return _mm_insert_epi16(_mm_loadl_epi64((const void *)p), u16, 4);
    case 6:
        memcpy(&u32, p + 8, 4);
        return _mm_insert_epi32(_mm_loadl_epi64((const void *)p), (int)u32, 2);
    default: return _mm_loadu_si128((const void *)p);
    }
}

#endif
