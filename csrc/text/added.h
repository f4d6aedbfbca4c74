/* added: finds added tokens (<|im_end|> and the like): leftmost, then longest.
 *
 * A token is looked for in the raw text or, where its "normalized" flag says so, in what is left of
 * it once the others are cut out and NFC is done (tokenizers, tokenizer/added_vocabulary.rs,
 * extract_and_normalize). */
#ifndef TEXT_ADDED_H
#define TEXT_ADDED_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "text/vocab.h"

typedef enum added_stage { ADDED_RAW = 1, ADDED_NORMALIZED = 2, ADDED_ANY = 3 } added_stage;

typedef struct added_token {
    const char *bytes; /* [n], borrowed from the vocabulary */
    size_t n;
    int32_t id;
    added_stage stage;
} added_token;

typedef struct added {
    added_token *tokens; /* [n] in byte order */
    size_t n;
    uint8_t leads[256]; /* the stages that have a token beginning with this byte */
    int stages;         /* all of them together */
} added;

/* Collects the VOCAB_ADDED entries of v, which must not change afterwards. */
err_code added_init(added *a, const vocab *v, err_info *e);
void added_free(added *a);

/* The longest token of `stage` that s[n] begins with: its id, or -1. */
int32_t added_at(const added *a, added_stage stage, const char *s, size_t n, size_t *len);

/* The first token of `stage` in s[n]: its id and place, or -1. */
int32_t added_find(const added *a, added_stage stage, const char *s, size_t n, size_t *at,
                   size_t *len);

#endif
