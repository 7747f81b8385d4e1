// The CPU kernels of region_cross_entropy, compiled once per instruction set (isa/*.cpp).
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
  // Both at once, for a gradient of 1 of the value. Grad says where the gradient goes, and no more; what it
  // has yet to be multiplied by is returned. Reads the logits once where loss_and_gradient.h can.
  double (*loss_and_gradient)(const RegionCrossEntropyParams&, const RegionCrossEntropyState&,
                              const RegionCrossEntropyGrad&, RegionBadLabel&, Parallel);
};

DYNPLAN_PER_ISA(extern const RegionCrossEntropyKernels region_cross_entropy)

inline const RegionCrossEntropyKernels& region_cross_entropy_kernels(CpuIsa isa) {
  DYNPLAN_ON_ISA(isa, region_cross_entropy);
}

}  // namespace dynplan::kernels
