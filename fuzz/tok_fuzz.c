/* A tokenizer.json, a NUL and text, all of any bytes: the file opens, or fails with one line; if it
 * opens, the text can be encoded both ways, and what was encoded decodes to the same text whole and
 * as a stream. Without a file before the NUL, the text goes to a small tokenizer that is sound. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/mem.h"
#include "text/tok.h"
#include "base/utf8.h"
#include "text/unicode.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static const char before_vocab[] =
    "{\"added_tokens\":[{\"id\":256,\"content\":\"<s>\",\"special\":true},"
    "{\"id\":257,\"content\":\"<s>\xc3\xa9\"},{\"id\":261,\"content\":\"s>K\",\"normalized\":true}],"
    "\"normalizer\":{\"type\":\"NFC\"},"
    "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{"
    "\"Regex\":\"(?i:'s|'t)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?[\\\\p{L}\\\\p{M}]+|\\\\p{N}| ?[^\\\\s"
    "\\\\p{L}\\\\p{M}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+\"},"
    "\"behavior\":\"Isolated\"},{\"type\":\"ByteLevel\",\"use_regex\":false}]},"
    "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{";
static const char after_vocab[] = ",\"aa\":258,\"aaaa\":259,\"\xc3\x83\xc2\xa9\":260},"
                                  "\"merges\":[\"a a\",\"aa aa\",[\"\xc3\x83\",\"\xc2\xa9\"]]}}";

static tok *open_bytes(const void *bytes, size_t n, err_info *e)
{
    char path[64];
    int fd = memfd_create("tok_fuzz", MFD_CLOEXEC);
    if (fd < 0 || write(fd, bytes, n) != (ssize_t)n) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    tok *t = tok_open(path, e);
    close(fd);
    return t;
}

/* GPT-2's character for a byte, in UTF-8. */
static int spell(int b, char out[5])
{
    static const char kept[] = "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`"
                               "abcdefghijklmnopqrstuvwxyz{|}~";
    if (b && strchr(kept, b))
        return snprintf(out, 5, b == '"' || b == '\\' ? "\\%c" : "%c", b);
    int moved = b < 0x21 ? b : b < 0xa1 ? b - 0x7f + 0x21 : 0x43;
    int c = b >= 0xa1 && b != 0xad ? b : 0x100 + moved;
    return snprintf(out, 5, "%c%c", 0xc0 | c >> 6, 0x80 | (c & 63));
}

static tok *open_sound(void)
{
    char text[8192], name[5];
    err_info e;
    int n = snprintf(text, sizeof text, "%s", before_vocab);
    for (int b = 0; b < 256; b++) {
        spell(b, name);
        n += snprintf(text + n, sizeof text - n, "%s\"%s\":%d", b ? "," : "", name, b);
    }
    n += snprintf(text + n, sizeof text - n, "%s", after_vocab);
    tok *t = open_bytes(text, (size_t)n, &e);
    if (!t) abort();
    return t;
}

/* Whether no byte is lost: then what was decoded has the same ids again. */
static int has_all_bytes(const tok *t)
{
    char seen[256] = {0};
    int n_seen = 0;
    for (int32_t id = 0; id < tok_n_vocab(t); id++) {
        size_t n;
        const char *bytes = tok_bytes(t, id, &n);
        if (n != 1 || seen[(uint8_t)*bytes]) continue;
        seen[(uint8_t)*bytes] = 1;
        n_seen++;
    }
    return n_seen == 256;
}

/* Streamed text is the decoded text, in whole characters. */
static void check_stream(const tok *t, const int32_t *ids, size_t n_ids, const char *text, size_t n)
{
    tok_stream *s = tok_stream_open(t, 0, NULL);
    size_t at = 0;
    for (size_t i = 0; i <= n_ids; i++) {
        const char *part;
        size_t n_part;
        if (i < n_ids ? tok_stream_step(s, ids[i], &part, &n_part, NULL)
                      : tok_stream_end(s, &part, &n_part, NULL))
            abort();
        if (n_part > n - at || memcmp(part, text + at, n_part) != 0) abort();
        if (utf8_valid(part, n_part) != n_part) abort();
        at += n_part;
    }
    if (at != n) abort();
    tok_stream_close(s);
}

static void check_text(const tok *t, const char *text, size_t n, int special)
{
    tok_range plain = {n / 3, n / 2};
    int32_t *ids, *again;
    size_t n_ids, n_again, n_back;
    char *back;
    err_info e = {0};
    if (tok_encode(t, text, n, special, &plain, 1, &ids, &n_ids, &e)) {
        if (e.code != ERR_LIMIT || !e.text[0]) abort(); /* the split pattern gave up */
        return;
    }
    if (tok_decode(t, ids, n_ids, 0, &back, &n_back, NULL)) abort();
    if (utf8_valid(back, n_back) != n_back) abort();
    check_stream(t, ids, n_ids, back, n_back);
    if (!special && has_all_bytes(t) &&
        tok_encode(t, back, n_back, 0, NULL, 0, &again, &n_again, NULL) == ERR_NONE) {
        if (n_again != n_ids || (n_ids && memcmp(ids, again, n_ids * sizeof *ids) != 0)) abort();
        mem_free(again);
    }
    mem_free(ids);
    mem_free(back);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    static tok *sound;
    const uint8_t *nul = n_bytes ? memchr(data, 0, n_bytes) : NULL;
    size_t n_file = nul ? (size_t)(nul - data) : n_bytes, skip = nul ? n_file + 1 : n_file;
    const char *text = (const char *)data + skip;
    err_info e = {0};
    if (!sound) sound = open_sound();
    tok *t = n_file ? open_bytes(data, n_file, &e) : sound;
    if (t)
        for (int special = 0; special < 2; special++)
            check_text(t, text, n_bytes - skip, special);
    else if (e.code == ERR_NONE || !e.text[0] || strchr(e.text, '\n'))
        abort();
    if (t != sound) tok_close(t);
    return 0;
}
