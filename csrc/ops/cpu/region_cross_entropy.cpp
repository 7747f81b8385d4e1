#include "kernels/region_cross_entropy_cpu.h"
#include "ops/cpu/parallel.h"
#include "ops/region_cross_entropy_backend.h"

namespace dynplan {
namespace {

const kernels::RegionCrossEntropyKernels& region_kernels() {
  return kernels::region_cross_entropy_kernels(kernels::cpu_isa());
}

struct CpuRegionCrossEntropy {
  static void forward(const char* op, const at::Tensor&, const kernels::RegionCrossEntropyParams& params,
                      const kernels::RegionCrossEntropyState& state) {
    const kernels::RegionBadLabel bad = region_kernels().forward(params, state, at_parallel);
    TORCH_CHECK_INDEX(!bad.found, op, ": expected target to be in 0..", params.classes - 1,
                      " or an ignored label, got ", bad.value);
  }

  static void backward(const char*, const at::Tensor&, const kernels::RegionCrossEntropyParams& params,
                       const kernels::RegionCrossEntropyState& state,
                       const kernels::RegionCrossEntropyGrad& grad) {
    region_kernels().backward(params, state, grad, at_parallel);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  RegionCrossEntropyOps<CpuRegionCrossEntropy>::implement(m);
}

}  // namespace dynplan
