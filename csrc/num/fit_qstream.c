/* qstream's exponents for mxfp4: the best of three around an anchor. Source:
 * github.com/olka/qstream at 9f8cd0c, qstream/core.py (quantize_mxfp4). Weights count as rounded to
 * bf16. Its logarithms are exact here, and its errors are summed in f64: they could differ for
 * blocks within a rounding of a tie. */
#include "num/fp.h"
#include "num/group.h"

enum { BLOCK = 32 };

/* Of magnitudes: the largest, and the value that torch.quantile(0.995) gives for 32 of them,
 * between the largest two. */
static void anchors(const float *v, float *largest, float *percentile)
{
    float first = 0, second = 0;
    for (int i = 0; i < BLOCK; i++) {
        float a = fabsf(v[i]), lower = a < first ? a : first;
        first = a > first ? a : first;
        second = lower > second ? lower : second;
    }
    float weight = 0.995f * (BLOCK - 1) - (BLOCK - 2);
    *largest = first;
    *percentile = first - (first - second) * (1.0f - weight);
}

static int floor_log2(float x)
{
    int e;
    frexpf(x, &e);
    return e - 1;
}

static int ceil_log2(float x)
{
    int e;
    return frexpf(x, &e) == 0.5f ? e - 1 : e;
}

/* Ties go to the smaller magnitude; what is below zero keeps its sign. */
static uint8_t nearest(float y)
{
    float a = fabsf(y);
    int c = (a > 0.25f) + (a > 0.75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f);
    return (uint8_t)(c + (a > 3.5f) + (a > 5.0f) + (y < 0 ? 8 : 0));
}

void num_qstream_codes(const num_group *g, const float *w, int64_t n, uint8_t *codes)
{
    for (int64_t i = 0; i < n; i++)
        codes[i] = nearest(fp_bf16_decode(fp_bf16_encode(w[i])) * g->code_scale);
}

static double block_error(const float *v, const float *importance, int exponent)
{
    float scale = ldexpf(1.0f, exponent), inverse = ldexpf(1.0f, -exponent);
    double error = 0;
    for (int i = 0; i < BLOCK; i++) {
        double d = (double)(fp_e2m1_decode(nearest(v[i] * inverse)) * scale) - (double)v[i];
        error += d * d * (importance ? (double)importance[i] : 1.0);
    }
    return error;
}

void num_qstream_fit(num_fit fit, const float *w, const float *importance, num_group *g)
{
    float v[BLOCK], largest, anchor;
    for (int i = 0; i < BLOCK; i++) v[i] = fp_bf16_decode(fp_bf16_encode(w[i]));
    anchors(v, &largest, &anchor);
    if (fit == NUM_FIT_QSTREAM_AMAX) anchor = largest;
    if (importance && !num_any(importance, BLOCK)) importance = NULL;
    int nothing = anchor < 1e-6f; /* such blocks are taken for noise in pruned experts */
    int lowest = floor_log2((nothing ? 1e-6f : anchor) / 6.0f) - 1, best = lowest;
    if (!nothing) {
        double least = block_error(v, importance, lowest);
        for (int k = lowest + 1; k <= lowest + 2; k++) {
            double error = block_error(v, importance, k);
            if (!(error < least)) continue;
            least = error;
            best = k;
        }
        int safe = ceil_log2((largest > 1e-12f ? largest : 1e-12f) / 6.0f);
        if (best < safe - 1) best = safe;
    }
    num_mx_group((uint8_t)(best + 127 < 254 ? best + 127 : 254), g);
    g->qstream = 1;
    if (nothing) g->code_scale = 0;
}
