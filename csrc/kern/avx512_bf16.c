/* The products of bf16.h by VDPBF16PS; the build adds its compiler flags to this file. */
#include "kern/bf16.h"
#include "kern/v16_avx512.h"
#include "kern/vector_sum.h"

/* Rows x tokens of one block of registers. */
enum { ROWS = 4, TOKENS = 4 };

#define EACH_ROW   _Pragma("GCC unroll 4") for (int r = 0; r < n_rows; r++)
#define EACH_TOKEN _Pragma("GCC unroll 4") for (int t = 0; t < n_tokens; t++)

/* Weights as they lie in the file, or decoded. */
typedef struct weights {
    const uint8_t *codes;
    int64_t stride, ahead; /* bytes from row to row, and to what is asked for */
} weights;

V16_FN __m512bh load_pairs(const uint8_t *p)
{
    return (__m512bh)_mm512_loadu_si512(p);
}

static void round_row(const float *x, int64_t cols, void *row)
{
    uint8_t *out = row;
    for (int64_t k = 0; k < cols; k += BF16_STEP)
        _mm512_storeu_si512(out + 2 * k, (__m512i)_mm512_cvtne2ps_pbh(v16_load(x + k + KERN_LANES),
                                                                      v16_load(x + k)));
}

/* n_rows x n_tokens, both constants: all sums stay in registers. */
V16_FN void dot_block(weights w, int n_rows, const uint8_t *x, int64_t ldx, int n_tokens,
                      int64_t cols, float *y, int64_t ldy)
{
    v16 sum[ROWS][TOKENS];
    __m512bh a[ROWS];
    EACH_ROW EACH_TOKEN sum[r][t] = v16_zero();
    for (int64_t at = 0; at < 2 * cols; at += 2 * BF16_STEP) {
        EACH_ROW
        {
            if (w.ahead) kern_prefetch(w.codes + r * w.stride + at + w.ahead);
            a[r] = load_pairs(w.codes + r * w.stride + at);
        }
        EACH_TOKEN
        {
            __m512bh b = load_pairs(x + t * ldx + at);
            EACH_ROW sum[r][t] = _mm512_dpbf16_ps(sum[r][t], a[r], b);
        }
    }
    EACH_TOKEN EACH_ROW y[t * ldy + r] = v16_sum(sum[r][t]);
}

V16_FN void dot_rows(weights w, int n_rows, const uint8_t *x, int64_t ldx, int64_t n_x,
                     int64_t cols, float *y, int64_t ldy)
{
    int64_t t = 0;
    for (; t + TOKENS <= n_x; t += TOKENS)
        dot_block(w, n_rows, x + t * ldx, ldx, TOKENS, cols, y + t * ldy, ldy);
    const uint8_t *rest = x + t * ldx;
    switch (n_x - t) {
    case 3: dot_block(w, n_rows, rest, ldx, 3, cols, y + t * ldy, ldy); break;
    case 2: dot_block(w, n_rows, rest, ldx, 2, cols, y + t * ldy, ldy); break;
    case 1: dot_block(w, n_rows, rest, ldx, 1, cols, y + t * ldy, ldy); break;
    }
}

/* VDPBF16PS does not look at MXCSR; adding lanes up does. */
static __attribute__((noinline)) void dots(weights w, int64_t n_rows, const uint8_t *x, int64_t ldx,
                                           int64_t n_x, int64_t cols, float *y, int64_t ldy)
{
    int64_t r = 0;
    for (; r + ROWS <= n_rows; r += ROWS, w.codes += ROWS * w.stride)
        dot_rows(w, ROWS, x, ldx, n_x, cols, y + r, ldy);
    for (; r < n_rows; r++, w.codes += w.stride) dot_rows(w, 1, x, ldx, n_x, cols, y + r, ldy);
}

static void product(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch)
{
    (void)scratch;
    int64_t ldx = kern_bf16_bytes(&kern_avx512bf16, w->cols);
    weights all = {w->codes + row * w->row_bytes, w->row_bytes, 0};
    if (n_x <= TOKENS) all.ahead = kern_ahead(w, row, ROWS);
    for (int64_t t = 0; t < n_x; t += KERN_TOKENS) {
        int64_t n = n_x - t < KERN_TOKENS ? n_x - t : KERN_TOKENS;
        const uint8_t *from = (const uint8_t *)x + t * ldx;
        BF16_FLUSHED(dots(all, n_rows, from, ldx, n, w->cols, y + t * ldy, ldy));
    }
}

const kern_bf16_ops kern_avx512_bf16 = {.element = 2, .round = round_row, .product = product};
