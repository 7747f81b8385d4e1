// An instruction set that this CPU has, as the input has it.
#pragma once

#include "fuzz/source.h"
#include "kernels/simd/isa.h"

namespace dynplan::fuzz {

inline kernels::CpuIsa some_isa(Source& random) {
  return static_cast<kernels::CpuIsa>(random.between(0, static_cast<int64_t>(kernels::best_cpu_isa())));
}

}  // namespace dynplan::fuzz
