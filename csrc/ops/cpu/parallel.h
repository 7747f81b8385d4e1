// ATen's thread pool as the Parallel of the torch-free kernels.
#pragma once

#include <ATen/Parallel.h>

#include "kernels/parallel.h"

// Without it parallel_for would silently run on one thread.
#ifndef INTRA_OP_PARALLEL
#error "compile with OpenMP (-fopenmp), as torch was"
#endif

namespace dynplan {

inline constexpr auto at_parallel = [](int64_t n, int64_t grain, kernels::RangeBody body) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end); });
};

}  // namespace dynplan
