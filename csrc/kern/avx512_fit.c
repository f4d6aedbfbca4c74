/* The searches of num/fit.h for this instruction set; the build adds its compiler flags to this
 * file. */
#include "kern/kern_const.h"
#include "num/fit_affine.h"
#include "num/fit_scaled.h"

const num_fit_ops kern_avx512_fit = {.affine = affine_mse, .scaled = scaled_mse};
