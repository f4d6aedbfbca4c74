/* terms: exp for sums over a vocabulary, in plain C that compilers turn into vectors. f32 is as
 * good as the logits are.
 *
 * Distances are those of logits below the largest; a piece has TERMS of them, what is missing at
 * the end of a row being TERMS_FAR. */
#ifndef SAMPLE_TERMS_H
#define SAMPLE_TERMS_H

#include <stdint.h>

/* How many at once: they stay in the first-level cache. */
enum { TERMS = 256 };

/* From here on a term is 0, as everything below FLT_MIN is. */
#define TERMS_FAR 88.0f

/* NaN is far too. */
static inline float terms_below(float distance)
{
    return distance < TERMS_FAR ? distance : TERMS_FAR;
}

/* exp(-below), 0 <= below <= TERMS_FAR, within 1e-7 of its value: 2^n times a polynomial in r,
 * where -below = n ln 2 + r. Adding 1.5 * 2^23 rounds, into the low bits, which become the
 * exponent. */
static inline float terms_exp(float below)
{
    float shifted = 12582912.0f - below * 1.44269504f, n = shifted - 12582912.0f;
    float r = -below - n * 0.693359375f - n * -2.12194440e-4f, p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union {
        float number;
        uint32_t bits;
    } power = {.number = shifted};
    power.bits = (power.bits + 127) << 23;
    return p * power.number;
}

static inline void terms_of(const float *below, float *out)
{
    for (int i = 0; i < TERMS; i++) out[i] = terms_exp(below[i]);
}

/* In eight sums: one alone would wait for each addition. */
static inline double terms_sum(const float *terms)
{
    double part[8] = {0};
    for (int i = 0; i < TERMS; i += 8)
        for (int j = 0; j < 8; j++) part[j] += terms[i + j];
    return ((part[0] + part[4]) + (part[2] + part[6])) +
           ((part[1] + part[5]) + (part[3] + part[7]));
}

#endif
