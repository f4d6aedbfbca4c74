/* vocab: which id stands for which bytes.
 *
 * tokenizer.json spells bytes as printable characters (GPT-2's table, openai/gpt-2 encoder.py,
 * bytes_to_unicode); inside moonlet an entry is its bytes. Added tokens share the id space but are
 * spelled as plain text and are not found by vocab_find. */
#ifndef TEXT_VOCAB_H
#define TEXT_VOCAB_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "text/buf.h"

enum { VOCAB_MOST_IDS = 1 << 22 }; /* a larger id in a file is damage, not a vocabulary */

/* VOCAB_NORMALIZED: an added token that is looked for behind NFC */
enum vocab_flag { VOCAB_USED = 1, VOCAB_ADDED = 2, VOCAB_SPECIAL = 4, VOCAB_NORMALIZED = 8 };

typedef struct vocab_entry {
    uint32_t offset, n_bytes; /* into bytes */
    uint8_t flags;
} vocab_entry;

typedef struct vocab {
    vocab_entry *entries; /* [n] */
    int32_t n;            /* highest id + 1 */
    buf bytes;
    int32_t *slots; /* [mask + 1] open addressing by hash of the bytes; -1 is free */
    uint32_t mask;
    int32_t byte_ids[256]; /* the entries of one byte; -1: the byte is lost, as in tokenizers */
} vocab;

/* Room for ids below n, n_entries of them in the table. vocab_free it even after failure. */
err_code vocab_init(vocab *v, int32_t n, size_t n_entries, err_info *e);
void vocab_free(vocab *v);

/* Raises the number of ids, for added tokens above the vocabulary. */
err_code vocab_grow(vocab *v, int32_t n, err_info *e);

/* Gives a free id < v->n its bytes. Without VOCAB_ADDED the entry can be found afterwards. */
err_code vocab_set(vocab *v, int32_t id, const char *bytes, size_t n, int flags, err_info *e);

/* Id of the entry with exactly these bytes, or -1. */
int32_t vocab_find(const vocab *v, const char *bytes, size_t n);

static inline const char *vocab_bytes(const vocab *v, int32_t id, size_t *n)
{
    *n = v->entries[id].n_bytes;
    return (const char *)v->bytes.data + v->entries[id].offset;
}

/* Appends the bytes that the valid UTF-8 s[n] spells in GPT-2's table. ERR_FORMAT, with a text that
 * wants the name of the thing before it, when s uses another character. */
err_code vocab_unspell(const char *s, size_t n, buf *out, err_info *e);

#endif
