#include "sample/heap.h"

static void sift(cand *heap, int64_t n, int64_t at)
{
    cand x = heap[at];
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && cand_before(&heap[child], &heap[child + 1])) child++;
        if (cand_before(&heap[child], &x)) break;
        heap[at] = heap[child];
    }
    heap[at] = x;
}

void heap_make(cand *heap, int64_t n)
{
    for (int64_t at = n / 2; at-- > 0;) sift(heap, n, at);
}

void heap_sift(cand *heap, int64_t n)
{
    sift(heap, n, 0);
}

void heap_sort(cand *heap, int64_t n)
{
    while (n > 1) {
        cand_swap(&heap[0], &heap[--n]);
        sift(heap, n, 0);
    }
}
