// The CPU kernels of region_cross_entropy, compiled once per instruction set
// (isa/region_cross_entropy_*.cpp).
#pragma once

#include "kernels/region_cross_entropy/params.h"
#include "kernels/simd/isa.h"

namespace dynplan::kernels {

struct RegionCrossEntropyKernels {
  // Writes every element of State. A label that is neither a class nor ignored counts as ignored and is
  // reported.
  RegionBadLabel (*forward)(const RegionCrossEntropyParams&, const RegionCrossEntropyState&, Parallel);
  void (*backward)(const RegionCrossEntropyParams&, const RegionCrossEntropyState&,
                   const RegionCrossEntropyGrad&, Parallel);
  // Both at once, the gradient being that of the value up to a factor, which is returned. Grad says where the
  // gradient goes, and no more. Reads the logits once where loss_and_gradient.h can.
  double (*once)(const RegionCrossEntropyParams&, const RegionCrossEntropyState&,
                 const RegionCrossEntropyGrad&, RegionBadLabel&, Parallel);
};

namespace baseline {
extern const RegionCrossEntropyKernels region_cross_entropy;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RegionCrossEntropyKernels region_cross_entropy;
}
namespace avx512 {
extern const RegionCrossEntropyKernels region_cross_entropy;
}
#endif

inline const RegionCrossEntropyKernels& region_cross_entropy_kernels(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::avx512) return avx512::region_cross_entropy;
  if (isa == CpuIsa::avx2) return avx2::region_cross_entropy;
#endif
  return baseline::region_cross_entropy;
}

}  // namespace dynplan::kernels
