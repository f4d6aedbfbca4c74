#include "text/vocab.h"

#include <string.h>

#include "base/mem.h"

err_code vocab_init(vocab *v, int32_t n, size_t n_entries, err_info *e)
{
    size_t n_slots = 16;
    while (n_slots < 2 * n_entries) n_slots *= 2;
    v->slots = mem_array(n_slots, sizeof *v->slots, e);
    if (!v->slots) return ERR_MEMORY;
    memset(v->slots, 0xff, n_slots * sizeof *v->slots);
    memset(v->byte_ids, 0xff, sizeof v->byte_ids);
    v->mask = (uint32_t)(n_slots - 1);
    return vocab_grow(v, n, e);
}

void vocab_free(vocab *v)
{
    mem_free(v->entries);
    mem_free(v->slots);
    buf_free(&v->bytes);
    *v = (vocab){0};
}

err_code vocab_grow(vocab *v, int32_t n, err_info *e)
{
    if (n <= v->n) return ERR_NONE;
    vocab_entry *entries = mem_array((size_t)n, sizeof *entries, e);
    if (!entries) return ERR_MEMORY;
    if (v->n) memcpy(entries, v->entries, (size_t)v->n * sizeof *entries);
    mem_free(v->entries);
    v->entries = entries;
    v->n = n;
    return ERR_NONE;
}

/* FNV-1a, folded so that the low bits depend on all of it. */
static uint32_t hash_bytes(const char *s, size_t n)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)s[i]) * UINT64_C(0x100000001b3);
    return (uint32_t)(h ^ h >> 32);
}

static uint32_t find_slot(const vocab *v, const char *bytes, size_t n)
{
    uint32_t slot = hash_bytes(bytes, n) & v->mask;
    for (; v->slots[slot] >= 0; slot = (slot + 1) & v->mask) {
        size_t have;
        const char *there = vocab_bytes(v, v->slots[slot], &have);
        if (have == n && memcmp(there, bytes, n) == 0) break;
    }
    return slot;
}

int32_t vocab_find(const vocab *v, const char *bytes, size_t n)
{
    return v->slots[find_slot(v, bytes, n)];
}

err_code vocab_set(vocab *v, int32_t id, const char *bytes, size_t n, int flags, err_info *e)
{
    if (n > UINT32_MAX - v->bytes.n)
        return err_set(e, ERR_LIMIT, "the vocabulary holds more than 4 GiB of text");
    if (!(flags & VOCAB_ADDED)) {
        v->slots[find_slot(v, bytes, n)] = id;
        if (n == 1) v->byte_ids[(uint8_t)*bytes] = id;
    }
    v->entries[id] =
        (vocab_entry){(uint32_t)v->bytes.n, (uint32_t)n, (uint8_t)(flags | VOCAB_USED)};
    return buf_append(&v->bytes, bytes, n, e);
}

/* GPT-2 keeps the printable characters of Latin-1 and moves the other 68 bytes, in order, to
 * U+0100 and up. -1 for a character that stands for no byte. */
static int byte_of(uint32_t c)
{
    if ((c >= 0x21 && c <= 0x7e) || (c >= 0xa1 && c <= 0xac) || (c >= 0xae && c <= 0xff))
        return (int)c;
    if (c < 0x100 || c > 0x143) return -1;
    uint32_t k = c - 0x100;
    if (k <= 0x20) return (int)k;                 /* 00-20 */
    if (k <= 0x42) return (int)(k - 0x21 + 0x7f); /* 7F-A0 */
    return 0xad;
}

err_code vocab_unspell(const char *s, size_t n, buf *out, err_info *e)
{
    err_code code = buf_reserve(out, n, e);
    if (code) return code;
    char *to = (char *)out->data + out->n;
    for (size_t i = 0; i < n; i++) {
        uint32_t c = (uint8_t)s[i];
        if (c >= 0xc0 && c < 0xe0 && i + 1 < n && ((uint8_t)s[i + 1] & 0xc0) == 0x80)
            c = (c & 31) << 6 | ((uint8_t)s[++i] & 63);
        else if (c >= 0x80)
            c = UINT32_MAX; /* three or four bytes: above the table */
        int b = byte_of(c);
        if (b < 0) return err_set(e, ERR_FORMAT, "is not spelled in GPT-2's byte alphabet");
        *to++ = (char)b;
    }
    out->n = (size_t)(to - (char *)out->data);
    return ERR_NONE;
}
