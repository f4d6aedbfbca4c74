/* The end of every dot product, for both vector instruction sets. Included after v16_*.h. */
#ifndef KERN_VECTOR_SUM_H
#define KERN_VECTOR_SUM_H

/* The tree over lanes: + 8, + 4, + 2, + 1. */
V16_FN float v16_sum(v16 a)
{
    __m256 h = v16_halves(a);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

#endif
