/* rng: a small seeded generator, xoshiro256** seeded through splitmix64
 * (Blackman and Vigna, https://prng.di.unimi.it). Same seed, same numbers, on every machine. */
#ifndef BASE_RNG_H
#define BASE_RNG_H

#include <stdint.h>

typedef struct rng {
    uint64_t s[4];
} rng;

void rng_seed(rng *r, uint64_t seed);
double rng_uniform(rng *r); /* in [0, 1), 53 bits */

#endif
