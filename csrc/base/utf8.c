#include "base/utf8.h"

#include <stdint.h>
#include <string.h>

/* Unicode 15, table 3-7: what may follow the lead byte. 0 bytes means it leads nothing. */
static size_t sequence_bytes(uint8_t lead, uint8_t *low, uint8_t *high)
{
    *low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    *high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (lead < 0x80) return 1;
    if (lead < 0xc2 || lead > 0xf4) return 0;
    return lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

utf8_kind utf8_next(const char *s, size_t n, size_t *len)
{
    const uint8_t *p = (const uint8_t *)s;
    uint8_t low, high;
    size_t want = sequence_bytes(p[0], &low, &high), i = 1;
    if (want == 0) {
        *len = 1;
        return UTF8_BROKEN;
    }
    while (i < want && i < n && p[i] >= low && p[i] <= high) {
        low = 0x80;
        high = 0xbf;
        i++;
    }
    *len = i;
    return i == want ? UTF8_WHOLE : i == n ? UTF8_CUT : UTF8_BROKEN;
}

size_t utf8_valid(const char *s, size_t n)
{
    size_t i = 0, len;
    while (i < n) {
        uint64_t eight;
        if (i + sizeof eight <= n) {
            memcpy(&eight, s + i, sizeof eight);
            if (!(eight & UINT64_C(0x8080808080808080))) {
                i += sizeof eight;
                continue;
            }
        }
        if (utf8_next(s + i, n - i, &len) != UTF8_WHOLE) break;
        i += len;
    }
    return i;
}
