/* bandwidth: how fast the threads of a pool read memory, which is what speeds are compared with. */
#ifndef BASE_BANDWIDTH_H
#define BASE_BANDWIDTH_H

#include <stdint.h>

#include "base/err.h"
#include "base/pool.h"

/* Reads n_bytes (rounded up to whole pieces of 4 MiB) of new memory n_passes times, all threads
 * sharing the work, and says how many bytes per second each pass read. What does not fit in the
 * last-level cache measures memory; the memory is given back. */
err_code bandwidth_measure(pool *p, int64_t n_bytes, int n_passes, double *bytes_per_second,
                           err_info *e);

#endif
