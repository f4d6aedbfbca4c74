/* The products of bf16.h by VDPBF16PS; the build adds its compiler flags to this file. */
#include "kern/bf16.h"
#include "kern/v16_avx512.h"
#include "kern/vector_sum.h"

/* Rows x tokens of one block of registers. */
enum { ROWS = 4, TOKENS = 4 };

#define EACH_ROW   _Pragma("GCC unroll 4") for (int r = 0; r < n_rows; r++)
#define EACH_TOKEN _Pragma("GCC unroll 4") for (int t = 0; t < n_tokens; t++)

/* Weights as they lie in the file, or decoded; scales of groups of columns where n_groups is not 0.
 */
typedef struct weights {
    const uint8_t *codes;
    int64_t stride;         /* bytes from row to row */
    const num_matrix *file; /* what codes are, from `row` on; NULL: decoded */
    int64_t row;
    const float *scales; /* [row][n_groups] */
    int64_t n_groups, group;
} weights;

static void round_row(const float *x, int64_t cols, void *row)
{
    uint8_t *out = row;
    for (int64_t k = 0; k < cols; k += BF16_STEP)
        _mm512_storeu_si512(out + 2 * k, (__m512i)_mm512_cvtne2ps_pbh(v16_load(x + k + KERN_LANES),
                                                                      v16_load(x + k)));
}

/* ---- E4M3 ----------------------------------------------------------------------------------- */

/* The bytes of bf16 numbers by the low seven bits of an E4M3 code. */
typedef struct e4m3_table {
    __m512i low[2], high[2];
} e4m3_table;

/* A lower byte is the exponent's last bit and the mantissa, an upper one the rest of the exponent:
 * codes 0 to 7 are multiples of 2^-9, 127 is NaN. */
#define UPPER_LOW 0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0
#define LOWER_LOW 0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70
#define EIGHT(b)  b, b, b, b, b, b, b, b

static e4m3_table load_table(void)
{
    static const uint8_t low[128] = {
        0x00,      0x00,      0x80,      0xc0,      0x00,      0x20,      0x40,      0x60,
        UPPER_LOW, LOWER_LOW, UPPER_LOW, LOWER_LOW, UPPER_LOW, LOWER_LOW, UPPER_LOW, LOWER_LOW,
        UPPER_LOW, LOWER_LOW, UPPER_LOW, LOWER_LOW, UPPER_LOW, LOWER_LOW, 0x80,      0x90,
        0xa0,      0xb0,      0xc0,      0xd0,      0xe0,      0xc0};
    static const uint8_t high[128] = {
        0x00,        0x3b,        0x3b,        0x3b,        0x3c,        0x3c,
        0x3c,        0x3c,        EIGHT(0x3c), EIGHT(0x3d), EIGHT(0x3d), EIGHT(0x3e),
        EIGHT(0x3e), EIGHT(0x3f), EIGHT(0x3f), EIGHT(0x40), EIGHT(0x40), EIGHT(0x41),
        EIGHT(0x41), EIGHT(0x42), EIGHT(0x42), EIGHT(0x43), 0x43,        0x43,
        0x43,        0x43,        0x43,        0x43,        0x43,        0x7f};
    return (e4m3_table){{_mm512_loadu_si512(low), _mm512_loadu_si512(low + 64)},
                        {_mm512_loadu_si512(high), _mm512_loadu_si512(high + 64)}};
}

/* 64 codes as bf16, in order; `most` keeps the largest upper byte without its sign. */
V16_FN void from_e4m3(const e4m3_table *table, __m512i codes, __m512i out[2], __m512i *most)
{
    /* unpacking takes eight bytes of each quarter */
    codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes);
    __m512i low = _mm512_permutex2var_epi8(table->low[0], codes, table->low[1]);
    __m512i high = _mm512_permutex2var_epi8(table->high[0], codes, table->high[1]);
    *most = _mm512_max_epu8(*most, high);
    /* high | codes & 0x80 */
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(INT8_MIN), 0xf8);
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
}

/* Adds a power of two in both halves of `shift` to the exponents of what is not zero. */
V16_FN __m512bh scaled(__m512i numbers, int32_t shift)
{
    __mmask32 some = _mm512_test_epi16_mask(numbers, _mm512_set1_epi16(INT16_MAX));
    return (__m512bh)_mm512_mask_add_epi16(numbers, some, numbers, _mm512_set1_epi32(shift));
}

enum { STRIP = 16 };

/* Powers of two of n <= STRIP scales as `scaled` takes them. 0 where exponents of some codes would
 * not be those of normal numbers: hardly ever. */
V16_FN int load_shifts(const uint8_t *scales, int64_t n, int32_t shifts[STRIP])
{
    enum { LEAST = 10, MOST = 246 }; /* codes are 2^-9 to 448 */
    __mmask16 there = (__mmask16)((1u << n) - 1);
    __m128i e = _mm_maskz_loadu_epi8(there, scales);
    __m512i shift = _mm512_sub_epi32(_mm512_cvtepu8_epi32(e), _mm512_set1_epi32(127));
    shift = _mm512_and_si512(_mm512_slli_epi32(shift, 7), _mm512_set1_epi32(0xffff));
    _mm512_storeu_si512(shifts, _mm512_or_si512(shift, _mm512_slli_epi32(shift, 16)));
    return !_mm_mask_cmpgt_epu8_mask(there, _mm_sub_epi8(e, _mm_set1_epi8(LEAST)),
                                     _mm_set1_epi8((char)(MOST - LEAST)));
}

V16_FN int has_nan(__m512i most)
{
    return _mm512_cmpge_epu8_mask(most, _mm512_set1_epi8(INT8_MAX)) != 0;
}

V16_FN __mmask64 first_bytes(int64_t n)
{
    return n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1;
}

/* A row as bf16 in place of its f32: with scales and codes of every kind. */
static __attribute__((noinline)) void lay_any(const num_matrix *w, int64_t row, float *f32)
{
    kern_avx512.decode[w->mode](w, row, f32);
    round_row(f32, w->cols, f32);
}

/* A row without scales. */
static void lay_codes(const e4m3_table *table, const num_matrix *w, int64_t row, uint8_t *out)
{
    const uint8_t *codes = w->codes + row * w->row_bytes;
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < w->cols; k += 2 * BF16_STEP) {
        int64_t n = w->cols - k;
        __m512i pair[2];
        from_e4m3(table, _mm512_maskz_loadu_epi8(first_bytes(n), codes + k), pair, &most);
        for (int i = 0; i < 2 && i * BF16_STEP < n; i++)
            _mm512_storeu_si512(out + 2 * k + 64 * i, pair[i]);
    }
}

/* A row with them; 0 when `scaled` would not do. */
static int lay_row(const e4m3_table *table, const num_matrix *w, int64_t row, uint8_t *out)
{
    const uint8_t *codes = w->codes + row * w->row_bytes;
    const uint8_t *scales = w->scales + row * (w->cols / BF16_STEP);
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < w->cols; k += 2 * BF16_STEP) {
        int32_t shifts[STRIP];
        int64_t n = w->cols - k;
        __m512i pair[2];
        if (!load_shifts(scales + k / BF16_STEP, n > BF16_STEP ? 2 : 1, shifts)) return 0;
        from_e4m3(table, _mm512_maskz_loadu_epi8(first_bytes(n), codes + k), pair, &most);
        for (int i = 0; i < 2 && i * BF16_STEP < n; i++)
            _mm512_storeu_si512(out + 2 * k + 64 * i, (__m512i)scaled(pair[i], shifts[i]));
    }
    return !has_nan(most);
}

/* ---- products ------------------------------------------------------------------------------- */

V16_FN __m512bh load_pairs(const uint8_t *p)
{
    return (__m512bh)_mm512_loadu_si512(p);
}

/* n_rows x n_tokens, both constants: all sums stay in registers. is_scaled: w has scales. */
V16_FN void dot_block(weights w, int is_scaled, int n_rows, const uint8_t *x, int64_t ldx,
                      int n_tokens, int64_t cols, float *y, int64_t ldy)
{
    v16 sum[ROWS][TOKENS], part[ROWS][TOKENS];
    __m512bh a[ROWS];
    kern_ahead ahead = {{NULL}};
    if (w.file) ahead = kern_look_ahead(w.file, w.row, n_rows);
    EACH_ROW EACH_TOKEN sum[r][t] = v16_zero();
    for (int64_t g = 0, k = 0; k < cols; g++) {
        EACH_ROW EACH_TOKEN part[r][t] = v16_zero();
        for (int64_t end = is_scaled && k + w.group < cols ? k + w.group : cols; k < end;
             k += BF16_STEP) {
            EACH_ROW
            {
                const uint8_t *p = w.codes + r * w.stride + 2 * k;
                if (w.file) kern_ask(&ahead, KERN_ASKS, 2 * k * n_rows + 64 * r);
                a[r] = load_pairs(p);
            }
            EACH_TOKEN
            {
                __m512bh b = load_pairs(x + t * ldx + 2 * k);
                EACH_ROW part[r][t] = _mm512_dpbf16_ps(part[r][t], a[r], b);
            }
        }
        EACH_ROW EACH_TOKEN sum[r][t] =
            is_scaled ? v16_fma(v16_set1(w.scales[r * w.n_groups + g]), part[r][t], sum[r][t])
                      : part[r][t];
    }
    EACH_TOKEN EACH_ROW y[t * ldy + r] = v16_sum(sum[r][t]);
}

V16_FN void dot_rows(weights w, int is_scaled, int n_rows, const uint8_t *x, int64_t ldx,
                     int64_t n_x, int64_t cols, float *y, int64_t ldy)
{
    int64_t t = 0;
    for (; t + TOKENS <= n_x; t += TOKENS)
        dot_block(w, is_scaled, n_rows, x + t * ldx, ldx, TOKENS, cols, y + t * ldy, ldy);
    const uint8_t *rest = x + t * ldx;
    y += t * ldy;
    switch (n_x - t) {
    case 3: dot_block(w, is_scaled, n_rows, rest, ldx, 3, cols, y, ldy); break;
    case 2: dot_block(w, is_scaled, n_rows, rest, ldx, 2, cols, y, ldy); break;
    case 1: dot_block(w, is_scaled, n_rows, rest, ldx, 1, cols, y, ldy); break;
    }
}

V16_FN void dots_of(weights w, int is_scaled, int64_t n_rows, const uint8_t *x, int64_t ldx,
                    int64_t n_x, int64_t cols, float *y, int64_t ldy)
{
    int64_t r = 0;
    for (; r + ROWS <= n_rows; r += ROWS) {
        dot_rows(w, is_scaled, ROWS, x, ldx, n_x, cols, y + r, ldy);
        w.codes += ROWS * w.stride;
        w.row += ROWS;
        w.scales += ROWS * w.n_groups;
    }
    for (; r < n_rows; r++) {
        dot_rows(w, is_scaled, 1, x, ldx, n_x, cols, y + r, ldy);
        w.codes += w.stride;
        w.row++;
        w.scales += w.n_groups;
    }
}

/* VDPBF16PS does not look at MXCSR; adding lanes up does. */
static __attribute__((noinline)) void dots(weights w, int64_t n_rows, const uint8_t *x, int64_t ldx,
                                           int64_t n_x, int64_t cols, float *y, int64_t ldy)
{
    if (w.n_groups)
        dots_of(w, 1, n_rows, x, ldx, n_x, cols, y, ldy);
    else
        dots_of(w, 0, n_rows, x, ldx, n_x, cols, y, ldy);
}

typedef struct mxfp8 {
    const uint8_t *codes, *scales; /* of the first row */
    int64_t stride, n_groups;
    kern_ahead ahead;
} mxfp8;

/* `n` <= STRIP groups from `strip` on: a constant for all but a ragged end. 0 when `scaled` would
 * not do. */
V16_FN int mxfp8_strip(const e4m3_table *table, const mxfp8 *w, int n_rows, int64_t strip,
                       int64_t n, const uint8_t *x, v16 *sum, __m512i *most)
{
    int32_t shifts[ROWS][STRIP];
    EACH_ROW if (!load_shifts(w->scales + r * w->n_groups + strip, n, shifts[r])) return 0;
    for (int64_t i = 0; i < n; i += 2) {
        int64_t k = (strip + i) * BF16_STEP;
        __m512bh x0 = load_pairs(x + 2 * k), x1 = x0;
        if (i + 1 < n) x1 = load_pairs(x + 2 * k + 64);
        EACH_ROW
        {
            const uint8_t *p = w->codes + r * w->stride + k;
            __m512i pair[2];
            kern_ask(&w->ahead, KERN_ASKS, k * n_rows + 64 * r);
            from_e4m3(table, _mm512_maskz_loadu_epi8(first_bytes((n - i) * BF16_STEP), p), pair,
                      most);
            sum[r] = _mm512_dpbf16_ps(sum[r], scaled(pair[0], shifts[r][i]), x0);
            if (i + 1 < n) sum[r] = _mm512_dpbf16_ps(sum[r], scaled(pair[1], shifts[r][i + 1]), x1);
        }
    }
    return 1;
}

/* n_rows rows of mxfp8, a constant, straight from the file. */
V16_FN int mxfp8_rows(const e4m3_table *table, const num_matrix *w, int64_t row, int n_rows,
                      const uint8_t *x, float *y)
{
    int64_t n_groups = w->cols / BF16_STEP, g = 0;
    const uint8_t *codes = w->codes + row * w->row_bytes;
    mxfp8 at = {codes, w->scales + row * n_groups, w->row_bytes, n_groups,
                kern_look_ahead(w, row, n_rows)};
    __m512i most = _mm512_setzero_si512();
    v16 sum[ROWS];
    int ok = 1;
    EACH_ROW sum[r] = v16_zero();
    for (; g + STRIP <= n_groups; g += STRIP)
        ok &= mxfp8_strip(table, &at, n_rows, g, STRIP, x, sum, &most);
    if (g < n_groups) ok &= mxfp8_strip(table, &at, n_rows, g, n_groups - g, x, sum, &most);
    EACH_ROW y[r] = v16_sum(sum[r]);
    return ok && !has_nan(most);
}

static __attribute__((noinline)) int mxfp8_gemv(const num_matrix *w, int64_t row, int64_t n_rows,
                                                const uint8_t *x, float *y)
{
    e4m3_table table = load_table();
    int ok = 1;
    int64_t r = 0;
    for (; r + ROWS <= n_rows; r += ROWS) ok &= mxfp8_rows(&table, w, row + r, ROWS, x, y + r);
    for (; r < n_rows; r++) ok &= mxfp8_rows(&table, w, row + r, 1, x, y + r);
    return ok;
}

/* n_rows rows of fp8, a constant, straight from the file. */
V16_FN void fp8_rows(const e4m3_table *table, const num_matrix *w, int64_t row, int n_rows,
                     const float *scales, const uint8_t *x, float *y)
{
    int64_t cols = w->cols, n_groups = (cols + w->group - 1) / w->group, k = 0;
    const uint8_t *codes = w->codes + row * w->row_bytes;
    kern_ahead ahead = kern_look_ahead(w, row, n_rows);
    v16 sum[ROWS], part[ROWS];
    __m512i most = _mm512_setzero_si512();
    EACH_ROW sum[r] = v16_zero();
    for (int64_t g = 0; g < n_groups; g++) {
        int64_t end = k + w->group < cols ? k + w->group : cols;
        EACH_ROW part[r] = v16_zero();
        for (; k < end; k += 2 * BF16_STEP) {
            int is_pair = end - k > BF16_STEP;
            __mmask64 there = first_bytes(end - k);
            __m512bh x0 = load_pairs(x + 2 * k), x1 = x0;
            if (is_pair) x1 = load_pairs(x + 2 * k + 64);
            EACH_ROW
            {
                const uint8_t *p = codes + r * w->row_bytes + k;
                __m512i pair[2];
                kern_ask(&ahead, KERN_ASKS, k * n_rows + 64 * r);
                from_e4m3(table, _mm512_maskz_loadu_epi8(there, p), pair, &most);
                part[r] = _mm512_dpbf16_ps(part[r], (__m512bh)pair[0], x0);
                if (is_pair) part[r] = _mm512_dpbf16_ps(part[r], (__m512bh)pair[1], x1);
            }
        }
        k = end;
        EACH_ROW sum[r] = v16_fma(v16_set1(scales[r * n_groups + g]), part[r], sum[r]);
    }
    EACH_ROW y[r] = v16_sum(sum[r]);
}

static __attribute__((noinline)) void fp8_gemv(const num_matrix *w, int64_t row, int64_t n_rows,
                                               const float *scales, const uint8_t *x, float *y)
{
    e4m3_table table = load_table();
    int64_t r = 0, n_groups = (w->cols + w->group - 1) / w->group;
    for (; r + ROWS <= n_rows; r += ROWS)
        fp8_rows(&table, w, row + r, ROWS, scales + r * n_groups, x, y + r);
    for (; r < n_rows; r++) fp8_rows(&table, w, row + r, 1, scales + r * n_groups, x, y + r);
}

/* n_rows rows of mxfp8 or fp8 as bf16 at the beginning of scratch, where they take half of it. */
static weights lay_rows(const num_matrix *w, int64_t row, int64_t n_rows, float *scratch)
{
    weights all = {.codes = (const uint8_t *)scratch, .stride = 2 * w->cols};
    e4m3_table table = load_table();
    for (int64_t r = 0; r < n_rows; r++) {
        float *out = scratch + r * w->cols / 2;
        if (w->mode == NUM_FP8)
            lay_codes(&table, w, row + r, (uint8_t *)out);
        else if (!lay_row(&table, w, row + r, (uint8_t *)out))
            BF16_FLUSHED(lay_any(w, row + r, out));
    }
    return all;
}

/* What dots read, for more than one token of what has to be decoded. */
static weights weights_of(const num_matrix *w, int64_t row, int64_t n_rows, int64_t n_x,
                          float *scratch, const float *scales)
{
    if (w->mode == NUM_BF16) {
        return (weights){.codes = w->codes + row * w->row_bytes,
                         .stride = w->row_bytes,
                         .file = n_x <= TOKENS ? w : NULL,
                         .row = row};
    }
    weights all = lay_rows(w, row, n_rows, scratch);
    if (w->mode != NUM_FP8) return all;
    all.scales = scales;
    all.group = w->group;
    all.n_groups = (w->cols + w->group - 1) / w->group;
    return all;
}

static void product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch)
{
    int64_t ldx = kern_bf16_bytes(&kern_avx512bf16, w->cols);
    float *scales = (float *)scratch + n_rows * w->cols;
    int is_done = 0;
    if (w->mode == NUM_FP8) kern_avx512_scales(w, row, n_rows, scales);
    if (w->mode == NUM_FP8 && n_x == 1) {
        BF16_FLUSHED(fp8_gemv(w, row, n_rows, scales, x, y));
        is_done = 1;
    } else if (w->mode == NUM_MXFP8 && n_x == 1) {
        BF16_FLUSHED(is_done = mxfp8_gemv(w, row, n_rows, x, y));
    }
    if (is_done) return;
    weights all = weights_of(w, row, n_rows, n_x, scratch, scales);
    for (int64_t t = 0; t < n_x; t += KERN_TOKENS) {
        int64_t n = n_x - t < KERN_TOKENS ? n_x - t : KERN_TOKENS;
        const uint8_t *from = (const uint8_t *)x + t * ldx;
        BF16_FLUSHED(dots(all, n_rows, from, ldx, n, w->cols, y + t * ldy, ldy));
    }
}

const kern_bf16_ops kern_avx512_bf16 = {.element = 2, .round = round_row, .product = product};
