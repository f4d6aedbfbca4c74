#include "text/pretok.h"

#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/mem.h"
#include "text/buf.h"

struct pretok {
    pcre2_code *code;
};

struct pretok_work {
    pcre2_match_data *data;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

/* White_Space (Unicode PropList.txt) as the inside of a character class: TAB to CR, NEL and the
 * separators. And everything else likewise, because a class cannot hold a negated class. */
#define SPACE "\\t-\\r\\x{85}\\p{Z}"
#define NON_SPACE                                                                                  \
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}!-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}"      \
    "\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}"                 \
    "\\x{3001}-\\x{10ffff}"

typedef struct rewriter {
    const char *pattern;
    size_t n, i;
    int in_class;
    buf out;
    err_info *e;
} rewriter;

static err_code refuse(const rewriter *r, size_t n, const char *why)
{
    int shown = 0;
    while ((size_t)shown < n && r->i + (size_t)shown < r->n && r->pattern[r->i + shown] > ' ')
        shown++;
    return err_set(r->e, ERR_UNSUPPORTED, "split pattern, byte %zu: '%.*s' %s", r->i, shown,
                   r->pattern + r->i, why);
}

static err_code take(rewriter *r, size_t n)
{
    err_code c = buf_append(&r->out, r->pattern + r->i, n, r->e);
    r->i += n;
    return c;
}

static err_code rewrite_escape(rewriter *r)
{
    if (r->i + 1 == r->n) return refuse(r, 1, "ends the pattern");
    char c = r->pattern[r->i + 1];
    if (c == 's' || c == 'S') {
        const char *set = r->in_class ? (c == 's' ? SPACE : NON_SPACE)
                                      : (c == 's' ? "[" SPACE "]" : "[^" SPACE "]");
        r->i += 2;
        return buf_append(&r->out, set, strlen(set), r->e);
    }
    /* \w, \b, \h, \x, \R, back references ...: same letters, other meanings. */
    int alnum = (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z');
    if (alnum && !strchr("pPdDrntf", c)) return refuse(r, 2, "is not supported");
    return take(r, 2);
}

static int starts(const rewriter *r, const char *with)
{
    size_t n = strlen(with);
    return n <= r->n - r->i && memcmp(r->pattern + r->i, with, n) == 0;
}

static err_code rewrite_in_class(rewriter *r)
{
    char c = r->pattern[r->i];
    if (c == '[') return refuse(r, 1, "inside a character class is not supported");
    if (starts(r, "&&")) return refuse(r, 2, "inside a character class is not supported");
    if (c == ']') r->in_class = 0;
    return take(r, 1);
}

static err_code rewrite_outside(rewriter *r)
{
    static const char *const groups[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    char c = r->pattern[r->i];
    if (c == '^' || c == '$' || c == '.') return refuse(r, 1, "is not supported");
    if (starts(r, "{,")) return refuse(r, 2, "is not supported");
    if (c == '[') {
        r->in_class = 1;
        size_t n = starts(r, "[^") ? 2 : 1;
        if (r->i + n < r->n && r->pattern[r->i + n] == ']')
            return refuse(r, n + 1, "is not supported");
        return take(r, n);
    }
    if (starts(r, "(?") || starts(r, "(*")) {
        for (size_t k = 0; k < sizeof groups / sizeof *groups; k++)
            if (starts(r, groups[k])) return take(r, strlen(groups[k]));
        return refuse(r, 4, "is not a kind of group that is supported");
    }
    return take(r, 1);
}

static err_code rewrite(rewriter *r)
{
    err_code c = ERR_NONE;
    while (r->i < r->n && !c)
        c = r->pattern[r->i] == '\\' ? rewrite_escape(r)
            : r->in_class            ? rewrite_in_class(r)
                                     : rewrite_outside(r);
    return c;
}

static err_code compile(pretok *p, const buf *pattern, err_info *e)
{
    int number;
    size_t at;
    p->code = pcre2_compile(pattern->n ? pattern->data : (PCRE2_SPTR) "", pattern->n,
                            PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK, &number, &at, NULL);
    if (!p->code) {
        PCRE2_UCHAR why[160];
        pcre2_get_error_message(number, why, sizeof why);
        return err_set(e, ERR_FORMAT, "split pattern: %s", (char *)why);
    }
    /* Without JIT (not built in, no executable memory) the interpreter gives the same pieces. */
    pcre2_jit_compile(p->code, PCRE2_JIT_COMPLETE);
    return ERR_NONE;
}

pretok *pretok_open(const char *pattern, size_t n, err_info *e)
{
    pretok *p = mem_array(1, sizeof *p, e);
    if (!p) return NULL;
    rewriter r = {.pattern = pattern, .n = n, .e = e};
    err_code c = rewrite(&r);
    if (!c) c = compile(p, &r.out, e);
    buf_free(&r.out);
    if (!c) return p;
    pretok_close(p);
    return NULL;
}

void pretok_close(pretok *p)
{
    if (!p) return;
    pcre2_code_free(p->code);
    mem_free(p);
}

pretok_work *pretok_work_open(const pretok *p, err_info *e)
{
    enum { STACK_FIRST = 32 << 10, STACK_MOST = 8 << 20, HEAP_MOST_KIB = 256 << 10 };
    pretok_work *w = mem_array(1, sizeof *w, e);
    if (!w) return NULL;
    w->data = pcre2_match_data_create_from_pattern(p->code, NULL);
    w->context = pcre2_match_context_create(NULL);
    w->stack = pcre2_jit_stack_create(STACK_FIRST, STACK_MOST, NULL);
    if (w->data && w->context) {
        pcre2_set_heap_limit(w->context, HEAP_MOST_KIB);
        /* NULL where there is no JIT, and then not needed */
        if (w->stack) pcre2_jit_stack_assign(w->context, NULL, w->stack);
        return w;
    }
    pretok_work_close(w);
    err_set(e, ERR_MEMORY, "cannot allocate the split pattern's match data");
    return NULL;
}

void pretok_work_close(pretok_work *w)
{
    if (!w) return;
    pcre2_match_data_free(w->data);
    pcre2_match_context_free(w->context);
    pcre2_jit_stack_free(w->stack);
    mem_free(w);
}

static size_t after_char(const char *text, size_t n, size_t i)
{
    do i++;
    while (i < n && ((unsigned char)text[i] & 0xc0) == 0x80);
    return i;
}

err_code pretok_split(const pretok *p, pretok_work *w, const char *text, size_t n, pretok_fn fn,
                      void *ctx, err_info *e)
{
    /* A pattern that takes each character a bounded number of times stays below this; one that
     * backtracks without end is stopped. */
    enum { LIMIT_FLOOR = 100000, LIMIT_PER_BYTE = 8 };
    uint64_t limit = LIMIT_FLOOR + (uint64_t)LIMIT_PER_BYTE * n;
    pcre2_set_match_limit(w->context, limit < UINT32_MAX ? (uint32_t)limit : UINT32_MAX);
    const size_t *ends = pcre2_get_ovector_pointer(w->data);
    size_t shown = 0; /* end of the last piece */
    err_code c = ERR_NONE;
    for (size_t i = 0; i < n && !c;) {
        int rc =
            pcre2_match(p->code, (PCRE2_SPTR)text, n, i, PCRE2_NO_UTF_CHECK, w->data, w->context);
        if (rc == PCRE2_ERROR_NOMATCH) break;
        if (rc < 0)
            return err_set(e, ERR_LIMIT, "split pattern gives up at byte %zu (PCRE2 error %d)", i,
                           rc);
        size_t begin = ends[0], end = ends[1];
        if (begin > shown) c = fn(ctx, text + shown, begin - shown, e);
        if (end > begin && !c) c = fn(ctx, text + begin, end - begin, e);
        shown = end;
        i = end > begin ? end : end < n ? after_char(text, n, end) : n;
    }
    if (shown < n && !c) c = fn(ctx, text + shown, n - shown, e);
    return c;
}
