#include "base/bandwidth.h"

#include <stdatomic.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "base/mem.h"

/* A piece is read in four streams, which is what one core needs to reach what it can: single ones
 * end at every page for the hardware's prefetcher. */
enum { STREAM_BYTES = 1 << 20, STREAMS = 4, PIECE_BYTES = STREAMS * STREAM_BYTES };
enum { PAGE_BYTES = 4096 };

typedef uint64_t vec __attribute__((vector_size(16)));

typedef struct reading {
    char *memory;
    atomic_ullong sink; /* what was read has to be used */
} reading;

static void touch_pieces(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const reading *r = ctx;
    for (int64_t i = begin * PIECE_BYTES; i < end * PIECE_BYTES; i += PAGE_BYTES) r->memory[i] = 1;
}

static void read_pieces(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    reading *r = ctx;
    vec sum[STREAMS] = {{0}};
    for (int64_t i = begin; i < end; i++) {
        const char *piece = r->memory + i * PIECE_BYTES;
        for (int64_t at = 0; at < STREAM_BYTES; at += 64) {
            for (int s = 0; s < STREAMS; s++) {
                const vec *line = (const vec *)(const void *)(piece + s * STREAM_BYTES + at);
                sum[s] += (line[0] + line[1]) + (line[2] + line[3]);
            }
        }
    }
    vec all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    atomic_fetch_xor_explicit(&r->sink, all[0] ^ all[1], memory_order_relaxed);
}

err_code bandwidth_measure(pool *p, int64_t n_bytes, int n_passes, double *bytes_per_second,
                           err_info *e)
{
    if (n_bytes < 1 || n_bytes > INT64_MAX - PIECE_BYTES)
        return err_set(e, ERR_RANGE, "cannot read %lld bytes", (long long)n_bytes);
    int64_t n_pieces = (n_bytes + PIECE_BYTES - 1) / PIECE_BYTES;
    size_t size = (size_t)n_pieces * PIECE_BYTES;
    reading r = {.memory = mem_pages(size, e)};
    if (!r.memory) return e->code;
    madvise(r.memory, size, MADV_HUGEPAGE); /* where the kernel has none, small pages do */
    pool_for(p, n_pieces, 1, touch_pieces, &r);
    for (int i = 0; i < n_passes; i++) {
        double start = clock_seconds();
        pool_for(p, n_pieces, 1, read_pieces, &r);
        bytes_per_second[i] = (double)size / (clock_seconds() - start);
    }
    mem_pages_free(r.memory, size);
    return ERR_NONE;
}
