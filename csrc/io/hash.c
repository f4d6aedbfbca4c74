#include "io/hash.h"

#include <nettle/base16.h>
#include <nettle/sha2.h>

#include "base/map.h"

enum { CHUNK = 8 << 20 };

static void finish(struct sha256_ctx *c, char out[HASH_TEXT])
{
    uint8_t digest[SHA256_DIGEST_SIZE];
    sha256_digest(c, sizeof digest, digest);
    base16_encode_update(out, sizeof digest, digest);
    out[HASH_TEXT - 1] = 0;
}

void hash_bytes(const void *data, size_t n_bytes, char out[HASH_TEXT])
{
    struct sha256_ctx c;
    sha256_init(&c);
    sha256_update(&c, n_bytes, data);
    finish(&c, out);
}

err_code hash_file(const char *path, const cancel_flag *cancel, char out[HASH_TEXT], err_info *e)
{
    map_file m;
    struct sha256_ctx c;
    if (map_open(&m, path, e)) return ERR_IO;
    err_code code = ERR_NONE;
    sha256_init(&c);
    for (size_t at = 0; at < m.n_bytes && !code; at += CHUNK) {
        size_t n = m.n_bytes - at < CHUNK ? m.n_bytes - at : CHUNK;
        sha256_update(&c, n, m.data + at);
        map_forget(m.data + at, n);
        if (cancel_raised(cancel)) code = err_set(e, ERR_CANCELLED, "interrupted");
    }
    map_close(&m);
    if (!code) finish(&c, out);
    return code;
}
