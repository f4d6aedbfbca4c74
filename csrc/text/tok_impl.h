/* tok_impl: what a tokenizer is made of; for the files of this room only. */
#ifndef TEXT_TOK_IMPL_H
#define TEXT_TOK_IMPL_H

#include "text/added.h"
#include "text/bpe.h"
#include "text/pretok.h"
#include "text/tok.h"
#include "text/vocab.h"

struct tok {
    vocab vocab;
    bpe bpe;
    added added;
    pretok *pretok; /* NULL: the text is one piece */
    int nfc;
};

static inline int tok_has(const tok *t, int32_t id)
{
    return id >= 0 && id < t->vocab.n && (t->vocab.entries[id].flags & VOCAB_USED);
}

#endif
