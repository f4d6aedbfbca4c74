/* Attention in integers in plain C: the definition of int_attn.h step by step. A block holds keys
 * as int8_t [KERN_BLOCK][dim] and values as int16_t [KERN_BLOCK][dim]. */
#include "kern/int_attn.h"

#include <math.h>

#include "kern/kern_const.h"

int64_t kern_attn_query_bytes(int64_t dim)
{
    int64_t width = int_attn_width(dim), n_parts = width / INT_ATTN_PART;
    return (width * 3 + n_parts * 2 * (int64_t)sizeof(float) + 63) / 64 * 64;
}

int64_t kern_attn_block_bytes(int64_t dim)
{
    int64_t width = int_attn_width(dim), n_parts = width / INT_ATTN_PART;
    return KERN_BLOCK * (width * 4 + (n_parts + 1) * (int64_t)sizeof(float));
}

static float stored(const void *p, int is_f16, int64_t i)
{
    return is_f16 ? fp_f16_decode(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

static uint32_t size_of(float x)
{
    return fp_bits(x) & 0x7fffffff;
}

static void prepare_key(const kern_kv *kv, int64_t j, int_block to)
{
    const void *page = kv->keys[j / KERN_PAGE];
    int8_t *codes = (int8_t *)to.keys + j * kv->dim;
    for (int64_t first = 0; first < kv->dim; first += INT_ATTN_PART) {
        int64_t end = first + INT_ATTN_PART < kv->dim ? first + INT_ATTN_PART : kv->dim;
        uint32_t largest = 0;
        float inverse;
        for (int64_t i = first; i < end; i++) {
            uint32_t size = size_of(stored(page, kv->is_f16, i * KERN_PAGE + j % KERN_PAGE));
            if (size > largest) largest = size;
        }
        to.key_scale[first / INT_ATTN_PART * KERN_BLOCK + j] =
            int_attn_scale(largest, INT_KEY_STEPS, &inverse);
        for (int64_t i = first; i < end; i++)
            codes[i] = (int8_t)int_attn_code(
                stored(page, kv->is_f16, i * KERN_PAGE + j % KERN_PAGE), inverse);
    }
}

static void prepare_value(const kern_kv *kv, int64_t j, int_block to)
{
    const void *page = kv->values[j / KERN_PAGE];
    int64_t row = j % KERN_PAGE * kv->dim;
    uint32_t largest = 0;
    float inverse;
    for (int64_t i = 0; i < kv->dim; i++) {
        uint32_t size = size_of(stored(page, kv->is_f16, row + i));
        if (size > largest) largest = size;
    }
    to.value_scale[j] = int_attn_scale(largest, INT_VALUE_STEPS, &inverse);
    for (int64_t i = 0; i < kv->dim; i++)
        to.values[j * kv->dim + i] =
            (int16_t)int_attn_code(stored(page, kv->is_f16, row + i), inverse);
}

static void prepare(const kern_kv *kv, void *block)
{
    int_block to = int_block_at(block, kv->dim);
    for (int64_t j = 0; j < kv->n; j++) {
        prepare_key(kv, j, to);
        prepare_value(kv, j, to);
    }
}

static float score(int_query q, int_block b, int64_t j, int64_t dim)
{
    const int8_t *k = (const int8_t *)b.keys + j * dim;
    float s = 0;
    for (int64_t g = 0; g * INT_ATTN_PART < dim; g++) {
        int32_t d = 0;
        for (int64_t i = g * INT_ATTN_PART; i < dim && i < (g + 1) * INT_ATTN_PART; i++)
            d += q.codes[i] * k[i];
        s = fmaf((float)d, b.key_scale[g * KERN_BLOCK + j] * q.scale[g], s);
    }
    return s;
}

/* e to codes p; returns their scale. */
static float weigh(const float *e, const float *value_scale, int64_t n, int32_t *p)
{
    uint32_t largest = 0;
    float inverse;
    for (int64_t j = 0; j < n; j++) {
        uint32_t size = size_of(e[j] * value_scale[j]);
        if (size > largest) largest = size;
    }
    float scale = int_attn_scale(largest, INT_WEIGHT_STEPS, &inverse);
    for (int64_t j = 0; j < n; j++) p[j] = int_attn_code(e[j] * value_scale[j], inverse);
    return scale;
}

static void attend(const kern_kv *kv, const void *block, const void *queries, int64_t n_q,
                   float *scores, const kern_found *found)
{
    int64_t n = kv->n, dim = kv->dim;
    int_block b = int_block_at(block, dim);
    int32_t p[KERN_BLOCK];
    for (int64_t t = 0; t < n_q; t++) {
        int_query q = int_query_at((const char *)queries + t * kern_attn_query_bytes(dim), dim);
        for (int64_t j = 0; j < n; j++) scores[j] = score(q, b, j, dim);
        found->sum[t] = kern_exps(scores, n, &found->top[t]);
        float scale = weigh(scores, b.value_scale, n, p);
        for (int64_t i = 0; i < dim; i++) {
            uint32_t sum = 0; /* what comes with a NaN scale may be any number */
            for (int64_t j = 0; j < n; j++) sum += (uint32_t)p[j] * (uint32_t)b.values[j * dim + i];
            found->out[t * dim + i] = (float)(int32_t)sum * scale;
        }
    }
}

const kern_attn_ops kern_scalar_attn = {
    .query = int_attn_query, .prepare = prepare, .attend = attend};
