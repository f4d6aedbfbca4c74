/* The searches for any processor. */
#include "num/fit_affine.h"
#include "num/fit_scaled.h"

const num_fit_ops num_fit_plain = {.affine = affine_mse, .scaled = scaled_mse};
