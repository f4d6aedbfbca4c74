/* NFC as tokenizers applies it: utf8proc's tables, less what is younger than tokenizers' own;
 * decompose, order marks, compose.
 *
 * utf8proc_map does all three, but orders marks by exchanging neighbours, which takes minutes for
 * a megabyte of marks in bad order; here a run of marks is ordered by counting. */
#include "text/unicode.h"

#include <string.h>
#include <utf8proc.h>

static const utf8proc_option_t compose_options =
    (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE);

/* No character below U+0300 is changed by NFC, and none of them combines with what stands before
 * it. So text can be cut before any of them, and only stretches of a last such character and the
 * higher ones behind it need work. */
static int is_low(const char *s)
{
    return (uint8_t)*s < 0xcc;
}

static size_t char_bytes(const char *s)
{
    uint8_t lead = (uint8_t)*s;
    return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

/* Characters that stand for themselves. tokenizers 0.23 normalises by Unicode 9 (its crate
 * unicode-normalization-alignments), so later ones, here up to Unicode 14, with a combining class
 * or a part in a composition have neither. U+11A7 has none in any version (Unicode 15, 3.12:
 * TBase is one less than the first trailing consonant), but utf8proc 2.8 composes it away. */
static const int32_t inert[][2] = {
    {0x07fd, 0x07fd},   {0x0898, 0x089f},   {0x08ca, 0x08d3},   {0x09fe, 0x09fe},
    {0x0c3c, 0x0c3c},   {0x0d3b, 0x0d3c},   {0x0eba, 0x0eba},   {0x11a7, 0x11a7},
    {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},
    {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85},
    {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e}, {0x11839, 0x1183a},
    {0x11930, 0x11930}, {0x11935, 0x11935}, {0x11938, 0x11938}, {0x1193d, 0x1193e},
    {0x11943, 0x11943}, {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47},
    {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45}, {0x11d97, 0x11d97},
    {0x16ff0, 0x16ff1}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef},
};

static int is_inert(int32_t c)
{
    size_t low = 0, high = sizeof inert / sizeof *inert;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (inert[mid][1] < c)
            low = mid + 1;
        else
            high = mid;
    }
    return low < sizeof inert / sizeof *inert && inert[low][0] <= c;
}

static int combining_class(int32_t c)
{
    int class = utf8proc_get_property(c)->combining_class;
    return class > 0 && is_inert(c) ? 0 : class;
}

/* Canonical ordering (Unicode 15, D109) of one run of marks: a stable counting sort. */
static void order_run(int32_t *run, size_t n, int32_t *spare)
{
    size_t at[257] = {0};
    for (size_t i = 0; i < n; i++) at[combining_class(run[i]) + 1]++;
    for (int c = 0; c < 256; c++) at[c + 1] += at[c];
    for (size_t i = 0; i < n; i++) spare[at[combining_class(run[i])]++] = run[i];
    memcpy(run, spare, n * sizeof *run);
}

static err_code order_marks(int32_t *cp, size_t n, buf *spare, err_info *e)
{
    for (size_t i = 0; i < n;) {
        size_t begin = i;
        int last = 0, in_order = 1, class;
        while (i < n && (class = combining_class(cp[i])) > 0) {
            in_order &= class >= last;
            last = class;
            i++;
        }
        if (!in_order) {
            spare->n = 0;
            err_code c = buf_reserve(spare, (i - begin) * sizeof *cp, e);
            if (c) return c;
            order_run(cp + begin, i - begin, spare->data);
        }
        if (i == begin) i++;
    }
    return ERR_NONE;
}

static err_code decompose(const char *s, size_t n, buf *cps, err_info *e)
{
    enum { MOST = 8 }; /* canonical decompositions have at most 4 */
    cps->n = 0;
    for (size_t i = 0; i < n;) {
        int32_t c;
        int boundary = 0;
        i += (size_t)utf8proc_iterate((const uint8_t *)s + i, (utf8proc_ssize_t)(n - i), &c);
        err_code code = buf_reserve(cps, MOST * sizeof c, e);
        if (code) return code;
        int32_t *to = (int32_t *)((char *)cps->data + cps->n);
        size_t n_to = 1;
        if (is_inert(c))
            *to = c;
        else
            n_to = (size_t)utf8proc_decompose_char(c, to, MOST, compose_options, &boundary);
        cps->n += n_to * sizeof c;
    }
    return ERR_NONE;
}

static err_code encode_all(const int32_t *cp, size_t n, buf *out, err_info *e)
{
    err_code c = buf_reserve(out, 4 * n, e);
    if (c) return c;
    for (size_t i = 0; i < n; i++)
        out->n += (size_t)utf8proc_encode_char(cp[i], (uint8_t *)out->data + out->n);
    return ERR_NONE;
}

/* Composes cp[n] in place between inert characters and writes it. */
static err_code compose(int32_t *cp, size_t n, buf *out, err_info *e)
{
    err_code c = ERR_NONE;
    for (size_t i = 0, end; i < n && !c; i = end) {
        for (end = i + 1; end < n && !is_inert(cp[end]);) end++;
        utf8proc_ssize_t n_nfc =
            utf8proc_normalize_utf32(cp + i, (utf8proc_ssize_t)(end - i), compose_options);
        if (n_nfc < 0) return err_set(e, ERR_FORMAT, "NFC: %s", utf8proc_errmsg(n_nfc));
        c = encode_all(cp + i, (size_t)n_nfc, out, e);
    }
    return c;
}

typedef struct nfc_work {
    buf cps, spare;
} nfc_work;

static err_code nfc_stretch(const char *s, size_t n, nfc_work *w, buf *out, err_info *e)
{
    err_code c = decompose(s, n, &w->cps, e);
    if (c) return c;
    int32_t *cp = w->cps.data;
    size_t n_cp = w->cps.n / sizeof *cp;
    c = order_marks(cp, n_cp, &w->spare, e);
    return c ? c : compose(cp, n_cp, out, e);
}

err_code unicode_nfc(const char *s, size_t n, buf *out, int *changed, err_info *e)
{
    size_t i = 0, copied = 0, base = 0;
    nfc_work w = {{0}, {0}};
    err_code c = ERR_NONE;
    *changed = 0;
    while (i < n && !c) {
        if (is_low(s + i)) {
            base = i;
            i += char_bytes(s + i);
            continue;
        }
        if (!*changed) out->n = 0;
        *changed = 1;
        while (i < n && !is_low(s + i)) i += char_bytes(s + i);
        c = buf_append(out, s + copied, base - copied, e);
        if (!c) c = nfc_stretch(s + base, i - base, &w, out, e);
        copied = base = i;
    }
    if (*changed && !c) c = buf_append(out, s + copied, n - copied, e);
    buf_free(&w.cps);
    buf_free(&w.spare);
    return c;
}
