#include <ATen/Dispatch.h>

#include <algorithm>
#include <atomic>

#include "kernels/region_cross_entropy/cpu.h"
#include "ops/cpu/kept_memory.h"
#include "ops/cpu/parallel.h"
#include "ops/region_cross_entropy_backend.h"

namespace dynplan {
namespace {

const kernels::RegionCrossEntropyKernels& region_kernels() {
  return kernels::region_cross_entropy_kernels(kernels::cpu_isa());
}

void check_labels(const char* op, const kernels::RegionCrossEntropyParams& params,
                  const kernels::RegionBadLabel& bad) {
  TORCH_CHECK_INDEX(!bad.found, op, ": expected target to be in 0..", params.classes - 1,
                    " or an ignored label, got ", bad.value);
}

struct CpuRegionCrossEntropy {
  static void forward(const char* op, const at::Tensor&, const kernels::RegionCrossEntropyParams& params,
                      const kernels::RegionCrossEntropyState& state) {
    check_labels(op, params, region_kernels().forward(params, state, at_parallel));
  }

  static void backward(const char*, const at::Tensor&, const kernels::RegionCrossEntropyParams& params,
                       const kernels::RegionCrossEntropyState& state,
                       const kernels::RegionCrossEntropyGrad& grad) {
    region_kernels().backward(params, state, grad, at_parallel);
  }

  static double loss_and_gradient(const char* op, const kernels::RegionCrossEntropyParams& params,
                                  const kernels::RegionCrossEntropyState& state,
                                  const kernels::RegionCrossEntropyGrad& grad) {
    kernels::RegionBadLabel bad;
    const double factor = region_kernels().loss_and_gradient(params, state, grad, bad, at_parallel);
    check_labels(op, params, bad);
    return factor;
  }

  // In place, from the end on: what was written last is still in a cache.
  static void scale(const at::Tensor& gradient, double factor) {
    AT_DISPATCH_FLOATING_TYPES(gradient.scalar_type(), "scale", [&] {
      constexpr int64_t kChunk = 1 << 16;
      const int64_t numbers = gradient.numel();
      const auto by = static_cast<scalar_t>(factor);
      scalar_t* const data = gradient.mutable_data_ptr<scalar_t>();
      std::atomic<int64_t> left = (numbers + kChunk - 1) / kChunk;
      at_parallel(at::get_num_threads(), 1, [&](int64_t, int64_t) {
        for (int64_t chunk = --left; chunk >= 0; chunk = --left) {
          const int64_t end = std::min(numbers, (chunk + 1) * kChunk);
          for (int64_t i = chunk * kChunk; i < end; ++i) data[i] *= by;
        }
      });
    });
  }

  static at::Tensor empty_like(const at::Tensor& input) { return empty_like_in_kept_memory(input); }
};

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  RegionCrossEntropyOps<CpuRegionCrossEntropy>::implement(m);
}

}  // namespace dynplan
