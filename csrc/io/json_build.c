#include "io/json_build.h"

#include <locale.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "io/json_c.h"

/* The text is known to be sound, so its end is looked for nowhere but behind a number. */
typedef struct builder {
    const uint8_t *p, *end;
    char *leaf;     /* scratch: [longest_leaf + 1] */
    locale_t plain; /* "C", in which numbers are written */
    int depth;
    char *repeated;
    const char *const *apart;
    size_t longest_leaf;
} builder;

static void skip_space(builder *b)
{
    while (*b->p == ' ' || *b->p == '\n' || *b->p == '\t' || *b->p == '\r') b->p++;
}

/* ---- strings ---------------------------------------------------------------------------- */

/* The character of \uXXXX at p: two escapes may make a surrogate pair, half of one is U+FFFD. */
static unsigned take_unicode(builder *b)
{
    int high = json_escape_value(b->p, b->end);
    b->p += 6;
    if ((high & 0xf800) != 0xd800) return (unsigned)high;
    int low = json_escape_value(b->p, b->end);
    if (high >= 0xdc00 || low < 0xdc00 || low > 0xdfff) return 0xfffd;
    b->p += 6;
    return 0x10000u + ((unsigned)(high & 0x3ff) << 10) + (unsigned)(low & 0x3ff);
}

static char *put_utf8(char *out, unsigned c)
{
    static const uint8_t leads[] = {0, 0, 0xc0, 0xe0, 0xf0};
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)(leads[n] | c);
    return out + n;
}

static char *take_escape(builder *b, char *out)
{
    static const char letters[] = "bfnrt", meant[] = "\b\f\n\r\t";
    char c = (char)b->p[1];
    if (c == 'u') return put_utf8(out, take_unicode(b));
    const char *at = strchr(letters, c);
    b->p += 2;
    *out = at ? meant[at - letters] : c;
    return out + 1;
}

/* The string at p into the scratch, with a NUL behind it. No escape is shorter than the character
 * it stands for. */
static size_t take_string(builder *b)
{
    char *out = b->leaf;
    for (b->p++; *b->p != '"';) {
        const uint8_t *from = b->p;
        while (*b->p != '"' && *b->p != '\\') b->p++;
        memcpy(out, from, (size_t)(b->p - from));
        out += b->p - from;
        if (*b->p == '\\') out = take_escape(b, out);
    }
    b->p++;
    *out = 0;
    return (size_t)(out - b->leaf);
}

/* ---- numbers ---------------------------------------------------------------------------- */

/* Digits with a sign, if they fit. */
static int as_int64(const char *s, int64_t *value)
{
    int negative = *s == '-';
    *value = 0;
    for (s += negative; *s >= '0' && *s <= '9'; s++) {
        int digit = negative ? '0' - *s : *s - '0';
        if (__builtin_mul_overflow(*value, 10, value) ||
            __builtin_add_overflow(*value, digit, value))
            return 0;
    }
    return *s == 0;
}

static json_value *build_number(builder *b)
{
    size_t n = 0;
    int64_t whole;
    for (; b->p < b->end && *b->p && strchr("+-.0123456789Ee", *b->p); b->p++)
        b->leaf[n++] = (char)*b->p;
    b->leaf[n] = 0;
    if (as_int64(b->leaf, &whole)) return json_object_new_int64(whole);
    return json_object_new_double(strtod_l(b->leaf, NULL, b->plain));
}

/* ---- parts that are set apart -------------------------------------------------------------- */

/* The text of an object or array that looks empty: its user data. */
typedef struct part {
    const uint8_t *p, *end;
    size_t n, longest_leaf;
} part;

static void free_part(json_value *v, void *p)
{
    (void)v;
    mem_free(p);
}

static void skip_string(builder *b)
{
    for (b->p++; *b->p != '"'; b->p++) b->p += *b->p == '\\';
    b->p++;
}

/* Behind the object or array at p; returns how many members or elements it has. */
static size_t skip_counting(builder *b)
{
    size_t n_commas = 0;
    int depth = 1;
    b->p++;
    skip_space(b);
    int is_empty = *b->p == '}' || *b->p == ']';
    while (depth > 0) {
        uint8_t c = *b->p;
        if (c == '"') {
            skip_string(b);
            continue;
        }
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        n_commas += c == ',' && depth == 1;
        b->p++;
    }
    return is_empty ? 0 : n_commas + 1;
}

static int is_apart(const builder *b)
{
    const char *const *name = b->depth == 2 && (*b->p == '{' || *b->p == '[') ? b->apart : NULL;
    while (name && *name && strcmp(*name, b->leaf) != 0) name++;
    return name && *name;
}

static json_value *build_apart(builder *b)
{
    json_value *v = *b->p == '{' ? json_object_new_object() : json_object_new_array_ext(1);
    part *made = v ? mem_array(1, sizeof *made, NULL) : NULL;
    if (!made) {
        json_object_put(v);
        return NULL;
    }
    *made = (part){.p = b->p, .end = b->end, .longest_leaf = b->longest_leaf};
    made->n = skip_counting(b);
    json_object_set_userdata(v, made, free_part);
    return v;
}

/* ---- values ----------------------------------------------------------------------------- */

static err_code build_value(builder *b, json_value **v);

static err_code fill_array(builder *b, json_value *array)
{
    for (b->p++, skip_space(b); *b->p != ']'; skip_space(b)) {
        json_value *v;
        if (*b->p == ',') b->p++;
        skip_space(b);
        if (build_value(b, &v) || json_object_array_add(array, v) != 0) {
            json_object_put(v);
            return ERR_MEMORY;
        }
    }
    b->p++;
    return ERR_NONE;
}

/* Of equal keys json-c keeps the last value at the first place, and its length as it was. */
static err_code add_member(builder *b, json_value *object, json_value *v)
{
    size_t n = take_string(b);
    int before = json_object_object_length(object);
    if (json_object_object_add(object, b->leaf, v) != 0) {
        json_object_put(v);
        return ERR_MEMORY;
    }
    if (b->depth > 1 || b->repeated || json_object_object_length(object) > before) return ERR_NONE;
    b->repeated = mem_copy(b->leaf, n, NULL);
    return b->repeated ? ERR_NONE : ERR_MEMORY;
}

static err_code fill_object(builder *b, json_value *object)
{
    for (b->p++, skip_space(b); *b->p != '}'; skip_space(b)) {
        json_value *v;
        if (*b->p == ',') b->p++;
        skip_space(b);
        const uint8_t *key = b->p;
        take_string(b);
        skip_space(b);
        b->p++;
        skip_space(b);
        int apart = is_apart(b);
        if (apart) v = build_apart(b);
        err_code code = apart ? (v ? ERR_NONE : ERR_MEMORY) : build_value(b, &v);
        /* the key is read now because the value has used the scratch, too */
        const uint8_t *behind = b->p;
        b->p = key;
        if (!code) code = add_member(b, object, v);
        b->p = behind;
        if (code) return code;
    }
    b->p++;
    return ERR_NONE;
}

static json_value *build_string(builder *b)
{
    size_t n = take_string(b);
    return json_object_new_string_len(b->leaf, (int)n);
}

static json_value *build_bool(builder *b)
{
    int is_true = *b->p == 't';
    b->p += is_true ? 4 : 5;
    return json_object_new_boolean(is_true);
}

/* *v is NULL for JSON null and on failure. */
static err_code build_value(builder *b, json_value **v)
{
    uint8_t c = *b->p;
    *v = NULL;
    if (c == 'n') {
        b->p += 4;
        return ERR_NONE;
    }
    *v = c == '{'               ? json_object_new_object()
         : c == '['             ? json_object_new_array_ext(2)
         : c == '"'             ? build_string(b)
         : c == 't' || c == 'f' ? build_bool(b)
                                : build_number(b);
    if (!*v) return ERR_MEMORY;
    if (c != '{' && c != '[') return ERR_NONE;
    b->depth++;
    err_code code = c == '{' ? fill_object(b, *v) : fill_array(b, *v);
    b->depth--;
    if (code) {
        json_object_put(*v);
        *v = NULL;
    }
    return code;
}

/* Room for strings and numbers, of which there are two at once where members are read. */
static err_code open_builder(builder *b, size_t longest_leaf)
{
    b->longest_leaf = longest_leaf;
    b->leaf = mem_array(2, longest_leaf + 1, NULL);
    b->plain = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    return b->leaf && b->plain ? ERR_NONE : ERR_MEMORY;
}

static void close_builder(builder *b, char *leaf)
{
    if (b->plain) freelocale(b->plain);
    mem_free(leaf);
}

err_code json_build(const char *text, size_t n_bytes, const json_facts *facts,
                    const char *const *apart, json_value **root, char **repeated)
{
    const uint8_t *begin = (const uint8_t *)text;
    builder b = {.p = begin + facts->begin, .end = begin + n_bytes, .apart = apart};
    err_code code = open_builder(&b, facts->longest_leaf);
    if (!code) code = build_value(&b, root);
    close_builder(&b, b.leaf);
    *repeated = b.repeated;
    return code;
}

size_t json_apart_length(const json_value *apart)
{
    const part *p = json_object_get_userdata((json_value *)(uintptr_t)apart);
    return p ? p->n : 0;
}

/* The value at p, behind its key and what stands between them. */
static err_code next_apart(builder *b, char *key, char *leaf, size_t *key_bytes, json_value **v)
{
    *key_bytes = 0;
    skip_space(b);
    if (*b->p == ',') b->p++;
    skip_space(b);
    if (key) {
        b->leaf = key;
        *key_bytes = take_string(b);
        skip_space(b);
        b->p++;
        skip_space(b);
    }
    b->leaf = leaf;
    return build_value(b, v);
}

int json_each_apart(const json_value *apart,
                    int (*fn)(void *ctx, const char *key, size_t key_bytes, json_value *v),
                    void *ctx, err_info *e)
{
    const part *from = json_object_get_userdata((json_value *)(uintptr_t)apart);
    if (!from) return 0;
    int stop = 0;
    builder b = {.p = from->p + 1, .end = from->end};
    err_code code = open_builder(&b, from->longest_leaf);
    char *scratch = b.leaf, *key = *from->p == '{' ? scratch : NULL;
    for (size_t i = 0; i < from->n && !code && !stop; i++) {
        size_t n;
        json_value *v;
        code = next_apart(&b, key, scratch + from->longest_leaf + 1, &n, &v);
        if (!code) stop = fn(ctx, key, n, v);
        json_object_put(v);
    }
    close_builder(&b, scratch);
    return code ? (int)err_set(e, code, "not enough memory for a JSON value") : stop;
}
