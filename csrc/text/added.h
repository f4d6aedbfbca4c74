/* added: finds added tokens (<|im_end|> and the like) in raw text: leftmost, then longest. */
#ifndef TEXT_ADDED_H
#define TEXT_ADDED_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "text/vocab.h"

typedef struct added_token {
    const char *bytes; /* [n], borrowed from the vocabulary */
    size_t n;
    int32_t id;
} added_token;

typedef struct added {
    added_token *tokens; /* [n] in byte order */
    size_t n;
    uint8_t leads[256]; /* whether a token begins with this byte */
} added;

/* Collects the VOCAB_ADDED entries of v, which must not change afterwards. */
err_code added_init(added *a, const vocab *v, err_info *e);
void added_free(added *a);

/* The longest token that s[n] begins with: its id, or -1. */
int32_t added_at(const added *a, const char *s, size_t n, size_t *len);

/* The first token in s[n]: its id and place, or -1. */
int32_t added_find(const added *a, const char *s, size_t n, size_t *at, size_t *len);

#endif
