/* tok: byte-level BPE tokenizers from tokenizer.json, both directions, and streaming.
 *
 * A tokenizer is immutable after opening and may be shared by threads; a stream belongs to one.
 * Order of work when encoding (Hugging Face tokenizers): broken UTF-8 becomes U+FFFD per maximal
 * subpart; added tokens are cut out of the raw text (leftmost, longest); the rest goes through NFC
 * if the file asks for it, loses the added tokens marked "normalized", is split by the file's own
 * regular expression (PCRE2, \s narrowed to White_Space), and merged by rank; bytes that no
 * vocabulary entry stands for are lost. What a file asks for and is not understood is an error. */
#ifndef TEXT_TOK_H
#define TEXT_TOK_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct tok tok;

/* `path`: a directory holding tokenizer.json, or such a file; tokenizer_config.json beside a file
 * of that name may add tokens (added_tokens_decoder). NULL on failure. */
tok *tok_open(const char *path, err_info *e);
void tok_close(tok *t);

int32_t tok_n_vocab(const tok *t); /* highest id + 1 */
/* Of an added token, or of a vocabulary entry as tokenizer.json spells it (a space is U+0120);
 * -1 if there is none. */
int32_t tok_id(const tok *t, const char *token);
int tok_is_special(const tok *t, int32_t id);

/* The bytes a token stands for (decoded, not GPT-2 spelling). NULL for ids that do not exist. */
const char *tok_bytes(const tok *t, int32_t id, size_t *n_bytes);

/* A run of input in which control strings are not recognised: text that came from a user. */
typedef struct tok_range {
    size_t begin, end; /* bytes */
} tok_range;

/* Text to ids. `special`: added tokens in the text become their ids, unless any of their bytes
 * lies in a `plain` range (sorted, disjoint; else ERR_RANGE); the ranges change nothing else. At
 * most 1 GiB of text (ERR_LIMIT). *ids is allocated and owned by the caller (mem_free). */
err_code tok_encode(const tok *t, const char *text, size_t n_bytes, int special,
                    const tok_range *plain, size_t n_plain, int32_t **ids, size_t *n_ids,
                    err_info *e);

/* The pieces that are merged separately, in order, of text in which added tokens are not looked
 * for; repaired and normalised. Stops at the first error that fn returns. */
typedef err_code (*tok_piece_fn)(void *ctx, const char *piece, size_t n_bytes, err_info *e);
err_code tok_split(const tok *t, const char *text, size_t n_bytes, tok_piece_fn fn, void *ctx,
                   err_info *e);

/* Ids to text; an id without token is ERR_RANGE; broken UTF-8 becomes U+FFFD per maximal subpart.
 * *text is owned by the caller. */
err_code tok_decode(const tok *t, const int32_t *ids, size_t n_ids, int skip_special, char **text,
                    size_t *n_bytes, err_info *e);

/* Ids one by one: each step gives the text that may be shown, never half a character. */
typedef struct tok_stream tok_stream;
tok_stream *tok_stream_open(const tok *t, int skip_special, err_info *e);
void tok_stream_close(tok_stream *s);
/* *text is borrowed until the next call on s. */
err_code tok_stream_step(tok_stream *s, int32_t id, const char **text, size_t *n_bytes,
                         err_info *e);
err_code tok_stream_end(tok_stream *s, const char **text, size_t *n_bytes, err_info *e);

#endif
