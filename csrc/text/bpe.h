/* bpe: merges bytes into vocabulary entries, lowest rank first, leftmost first. */
#ifndef TEXT_BPE_H
#define TEXT_BPE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "text/buf.h"
#include "text/vocab.h"

typedef struct bpe_merge {
    uint64_t pair; /* left id << 32 | right id; all ones is a free slot */
    uint32_t rank;
    int32_t id; /* of the result */
} bpe_merge;

typedef struct bpe {
    bpe_merge *slots; /* [mask + 1] open addressing */
    uint32_t mask;
} bpe;

err_code bpe_init(bpe *b, size_t n_merges, err_info *e);
void bpe_free(bpe *b);

/* Of equal pairs the last added counts, as in Hugging Face tokenizers' map. */
void bpe_add(bpe *b, int32_t left, int32_t right, uint32_t rank, int32_t id);

/* What encoding one piece needs; kept between pieces, zeroed before the first. */
typedef struct bpe_work {
    buf parts, heap;
} bpe_work;

void bpe_work_free(bpe_work *w);

/* Appends the ids of piece[n] (int32) to *ids; bytes without an entry are left out before merging,
 * as tokenizers does without an unknown token. O(n log n) for any piece. */
err_code bpe_encode(const bpe *b, const vocab *v, const char *piece, size_t n, bpe_work *w,
                    buf *ids, err_info *e);

#endif
