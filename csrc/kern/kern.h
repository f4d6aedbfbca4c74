/* kern: the arithmetic, in variants for each instruction set, chosen at run time.
 *
 * The only room with intrinsics. A kern_ops is an immutable table; kern_select returns one and
 * may be called from any thread. No kernel allocates, keeps state or looks at the thread count.
 *
 * Summation order is part of the definition, so that all variants agree to the bit and a token's
 * result does not depend on what else is in the batch: a dot product runs 16 partial sums, lane j
 * adding elements j, j+16, j+32, ... by fused multiply-add in rising order (missing elements of
 * the last 16 are zeros), and the lanes are then added as a tree: j with j+8, then +4, +2, +1.
 * Products with activations in 8 bits have the order of int8.h, attention in integers that of
 * int_attn.h.
 * exp and what is built on it is our own polynomial (kern_expf), the same in every variant. Which
 * NaN comes out where several could is not defined: variants agree on where NaNs are. */
#ifndef KERN_KERN_H
#define KERN_KERN_H

#include <stdint.h>

#include "base/cpu.h"
#include "kern/row.h"
#include "num/fit.h"
#include "num/matrix.h"

/* Rows that one call of `dots` handles: enough independent sums to hide the latency of fma. */
enum { KERN_ROWS = 8 };

/* Products with activations rounded to 8 bits; see int8.h for what they compute. */
typedef struct kern_int8_ops {
    /* x[cols] into kern_int8_bytes(cols) bytes, 64-byte aligned. cols is a multiple of 32. */
    void (*quantize)(const float *x, int64_t cols, void *row);

    /* y[t*ldy + r] = row (row + r) of w . quantized row t, for r < n_rows and t < n_x.
     * scratch: kern_scratch_bytes(w->cols). */
    void (*product)(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch);
} kern_int8_ops;

/* Products with activations rounded to bf16; see bf16.h for what they compute. */
typedef struct kern_bf16_ops {
    int element; /* bytes of a rounded number */

    /* x[cols] into kern_bf16_bytes(ops, cols) bytes. cols is a multiple of 32. */
    void (*round)(const float *x, int64_t cols, void *row);

    /* y[t*ldy + r] = row (row + r) of w . rounded row t, for r < n_rows and t < n_x. scratch:
     * floats [n_rows][cols], then [n_rows][cols / 32]. */
    void (*product)(const num_matrix *w, int64_t row, int64_t n_rows, const void *x, int64_t n_x,
                    float *y, int64_t ldy, void *scratch);
} kern_bf16_ops;

/* Positions whose keys lie side by side, and positions that share a softmax: what a key or value
 * meets is cut at multiples of KERN_BLOCK, wherever a call begins or ends. */
enum { KERN_PAGE = 32, KERN_BLOCK = 256, KERN_BLOCK_PAGES = KERN_BLOCK / KERN_PAGE };

/* Dimensions of a key that are rounded together by attention in integers. */
enum { KERN_KEY_PART = 64 };

/* Parts of a key, of which the last may be shorter. */
static inline int64_t kern_key_parts(int64_t dim)
{
    return (dim + KERN_KEY_PART - 1) / KERN_KEY_PART;
}

/* Keys and values of one head at n <= KERN_BLOCK positions, in pages: keys [dim][KERN_PAGE], so
 * that a register holds one dimension of many positions; values [KERN_PAGE][dim]. Behind them are,
 * in the same type, the sizes that `prepare` would have to look for: the largest magnitudes, NaN
 * above all, of each key's parts [parts][KERN_PAGE] and of each value [KERN_PAGE]. Keys and sizes
 * are read whole, whatever is behind position n, values up to it. */
typedef struct kern_kv {
    const void *keys[KERN_BLOCK_PAGES], *values[KERN_BLOCK_PAGES];
    const void *next_keys[KERN_BLOCK_PAGES];   /* that are met next, to be fetched; or `keys` */
    const void *next_values[KERN_BLOCK_PAGES]; /* likewise */
    int is_f16;                                /* else f32 */
    int64_t n, dim;
} kern_kv;

/* What some queries found in a block; rows of several blocks are merged by `axpby`. */
typedef struct kern_found {
    float *top, *sum; /* [n_q] */
    float *out;       /* [n_q][dim] */
} kern_found;

/* Attention in integers; see int_attn.h for what it computes. */
typedef struct kern_attn_ops {
    /* q[dim] times factor into kern_attn_query_bytes(dim) bytes, 64-byte aligned. */
    void (*query)(const float *q, int64_t dim, float factor, void *row);

    /* Keys and values into kern_attn_block_bytes(dim) bytes, 64-byte aligned. */
    void (*prepare)(const kern_kv *kv, void *block);

    /* kern_ops.attend for n_q rows of queries in the first kv->n positions of a prepared block; of
     * kv's pages only those that are met next are looked at. */
    void (*attend)(const kern_kv *kv, const void *block, const void *queries, int64_t n_q,
                   float *scores, const kern_found *found);
} kern_attn_ops;

int64_t kern_attn_query_bytes(int64_t dim);
int64_t kern_attn_block_bytes(int64_t dim);

/* n tokens of one head for `delta_rule`: row t of each array is at its stride times t. */
typedef struct kern_delta {
    const float *q, *k;        /* [dk] each */
    float *v;                  /* [dv], replaced by the output */
    const float *decay, *beta; /* one number each */
    int64_t n, ld_qk, ld_v, ld_gates;
} kern_delta;

typedef struct kern_ops {
    const char *name; /* cpu_level_name of its level */
    cpu_level level;

    /* Row `row` of w as f32 into out[cols], bit-equal to num_row_decode. */
    void (*decode[NUM_N_MODES])(const num_matrix *w, int64_t row, float *out);

    /* y[r] = row (row + r) of w . x[cols] for r < n_rows: the bits of decode and dots, without the
     * way through memory where the variant can. scratch: [cols]. */
    void (*product)(const num_matrix *w, int64_t row, int64_t n_rows, const float *x, float *y,
                    float *scratch);

    /* y[t*ldy + r] = w[r*ldw + :] . x[t*ldx + :] for r < n_rows <= KERN_ROWS, t < n_x; f32. */
    void (*dots)(const float *w, int64_t ldw, int n_rows, const float *x, int64_t ldx, int64_t n_x,
                 int64_t cols, float *y, int64_t ldy);

    /* out[i] = x[i] * rsqrt(mean(x^2) + eps) * weight[i]; weight NULL means 1. In place is fine. */
    void (*rms_norm)(const float *x, const float *weight, int64_t n, float eps, float *out);

    /* out[i] = x[i] / sqrt(sum(x^2) + eps) * scale */
    void (*l2_norm)(const float *x, int64_t n, float eps, float scale, float *out);

    /* x[i] = silu(x[i]);  gate[i] = silu(gate[i]) * up[i];  x[i] *= sigmoid(gate[i]) */
    void (*silu)(float *x, int64_t n);
    void (*silu_mul)(float *gate, const float *up, int64_t n);
    void (*sigmoid_mul)(float *x, const float *gate, int64_t n);

    /* y[i] += a * x[i], by fma */
    void (*axpy)(float a, const float *x, float *y, int64_t n);

    /* Softmax in place. -inf entries become 0, also when there is nothing else. Returns
     * max + ln(sum(exp(x - max))), -inf when there is nothing else. */
    float (*softmax)(float *x, int64_t n);

    /* Causal depthwise convolution of one token, then SiLU: out[c] = silu(sum_j w[c*k + j] *
     * row_j[c]), j rising; rows[0] oldest ... rows[k-1] the current token. w: [n][k], out: [n]. */
    void (*conv_silu)(const float *const *rows, const float *w, int k, int64_t n, float *out);

    /* The gated delta rule for one head (Yang et al., Gated Delta Networks), token after token:
     *   r = decay (S k);  d = beta (v - r);  S = d k^T + decay S, by fma;  v = S q
     * S: [dv][dk], k contiguous. S k and S q are dot products as above. */
    void (*delta_rule)(float *S, int64_t dk, int64_t dv, const kern_delta *d);

    /* For each of the n_q queries [dim]:
     *   s[j] = scale (sum_i q[i] k[j][i]);  top = max_j s[j]
     *   e[j] = exp(s[j] - top), 0 where s[j] is -inf;  sum = sum_j e[j];  out = sum_j e[j] v[j]
     * The first and the last sum add by fma in rising order from +0, `sum` adds lanes j mod 16 and
     * then their tree. scores: scratch [n_q][KERN_BLOCK]. */
    void (*attend)(const kern_kv *kv, const float *q, int64_t n_q, float scale, float *scores,
                   const kern_found *found);

    /* acc[i] = b x[i] + (a acc[i]), by fma: how blocks come together. */
    void (*axpby)(float b, const float *x, float a, float *acc, int64_t n);

    /* f16 rows of the KV cache. */
    void (*f16_encode)(const float *x, uint16_t *out, int64_t n);
    void (*f16_decode)(const uint16_t *x, float *out, int64_t n);

    const kern_int8_ops *int8;
    const kern_bf16_ops *bf16;
    const kern_attn_ops *attn;
    const num_fit_ops *fit; /* for num_fit_row */
    const kern_row_ops *row;
} kern_ops;

/* The table of `level`, or of the best built level below it. Never NULL. */
const kern_ops *kern_select(cpu_level level);

/* How many tables are built and usable on this machine, and each of them (0 is scalar), rising. */
int kern_count(void);
const kern_ops *kern_at(int i);

/* Our exp: within 2 ulp where e^x is a normal number (1.01 found by trying every third float),
 * 0 below -87.3365, +inf above 88.7228; bit-equal in all variants. sigmoid and silu
 * (x / (1 + e^-x)) are built on it. */
float kern_expf(float x);
float kern_sigmoidf(float x);
float kern_softplusf(float x); /* ln(1 + e^x); x itself above 20 */

/* ---- driver: y = x W^T over a pool ------------------------------------------------------ */

struct pool;

/* Bytes of scratch that one worker of kern_linear needs for matrices up to `max_cols` wide. */
int64_t kern_scratch_bytes(int64_t max_cols);

/* y[t*ldy + r] = sum_k w[r][k] x[t*ldx + k] for all rows r and t < n_x.
 * scratch: pool_n_threads(p) pieces of kern_scratch_bytes(w->cols), 64-byte aligned. */
void kern_linear(struct pool *p, const kern_ops *ops, const num_matrix *w, const float *x,
                 int64_t ldx, int64_t n_x, float *y, int64_t ldy, void *scratch);

/* Where the driver finds a job: its first block among those of all jobs, the first row of its x
 * among those of all; and rounded, that x and what the job picks of it in 8 bits, and x in bf16. */
typedef struct kern_place {
    int64_t first_block, first_row;
    char *source, *rows, *bf16;
} kern_place;

/* Several products in one parallel region: the experts of a token, or matrices that share x. */
typedef struct kern_job {
    const num_matrix *w;
    const float *x;
    float *y;
    int64_t ldx, n_x, ldy;
    const int32_t *pick; /* which rows of x; NULL: the first n_x. In 8 bits only */
    int64_t n_from;      /* rows of x that jobs pick from */
    kern_place place;    /* written by the driver */
} kern_job;

void kern_linear_jobs(struct pool *p, const kern_ops *ops, kern_job *jobs, int64_t n_jobs,
                      int64_t max_cols, void *scratch);

/* Whether products with w are defined for 8-bit activations: affine groups of a multiple of 32,
 * mxfp4, nvfp4, in rows of a multiple of 32. The others hold more than a byte of a weight. */
int kern_takes_int8(const num_matrix *w);

/* Whether products with w are defined for activations in bf16: bf16, mxfp8 and fp8 (groups of a
 * multiple of 32) in rows of a multiple of 32. */
int kern_takes_bf16(const num_matrix *w);

/* Bytes of a row of x in 8 bits, in bf16. */
int64_t kern_int8_bytes(int64_t cols);
int64_t kern_bf16_bytes(const kern_ops *ops, int64_t cols);

/* kern_linear_jobs with activations in 8 bits or in bf16 where the matrix takes them. rows: 64-byte
 * aligned, kern_int8_bytes(cols) for each row of x that meets a matrix which takes 8 bits and for
 * each row that is picked, kern_bf16_bytes(ops, cols) for each that meets one which takes bf16;
 * jobs that follow one another and share x, and what they pick of it, share these. Jobs that pick
 * must take 8 bits. */
void kern_linear_jobs_fast(struct pool *p, const kern_ops *ops, kern_job *jobs, int64_t n_jobs,
                           int64_t max_cols, void *scratch, void *rows);

#endif
