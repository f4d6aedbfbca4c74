/* Any bytes as what a connection receives: followed at once or in pieces they are the same, and
 * nothing but extensions of chunks is overwritten. The first byte says how large the pieces are. */
#include <stdlib.h>
#include <string.h>

#include "net/framing.h"

enum { BODY_BYTES = 1000 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    if (n_bytes < 2) return 0;
    size_t n = n_bytes - 1, piece = 1 + data[0];
    char *whole = malloc(n), *pieces = malloc(n);
    if (!whole || !pieces) abort();
    memcpy(whole, data + 1, n);
    memcpy(pieces, data + 1, n);
    net_framing a = {0}, b = {0};
    int status = net_follow(&a, BODY_BYTES, whole, n), again = 0;
    for (size_t at = 0; at < n && !again; at += piece)
        again = net_follow(&b, BODY_BYTES, pieces + at, piece < n - at ? piece : n - at);
    if (status != again || (status != 0 && status != 400 && status != 413)) abort();
    if (a.in != b.in || a.body != b.body || a.left != b.left || a.n_line != b.n_line) abort();
    if (memcmp(whole, pieces, n) != 0 || (a.in != NET_IN_HEAD && a.body > BODY_BYTES)) abort();
    for (size_t i = 0; i < n; i++) {
        int is_extension = data[i + 1] == ';' || data[i + 1] == '\t';
        if (whole[i] != (is_extension && whole[i] == ' ' ? ' ' : (char)data[i + 1])) abort();
    }
    free(whole);
    free(pieces);
    return 0;
}
