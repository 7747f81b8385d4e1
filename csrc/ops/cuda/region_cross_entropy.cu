#include <ATen/ops/empty.h>

#include "ops/cuda/launch.h"
#include "ops/cuda/region_cross_entropy_kernels.h"
#include "ops/region_cross_entropy.h"
#include "ops/region_cross_entropy_backend.h"

namespace dynplan {
namespace {

using Params = kernels::RegionCrossEntropyParams;
using State = kernels::RegionCrossEntropyState;
using Grad = kernels::RegionCrossEntropyGrad;

// Calls run with a value of the logits' type.
template <typename Run>
cudaError_t with_logit_type(kernels::RegionDtype type, Run run) {
  switch (type) {
    case kernels::RegionDtype::f32:
      return run(float{});
    case kernels::RegionDtype::f64:
      return run(double{});
    case kernels::RegionDtype::f16:
      return run(__half{});
    default:
      return run(__nv_bfloat16{});
  }
}

struct CudaBackend {
  static void forward(const char* op, const at::Tensor& input, const Params& params, const State& state) {
    const DeviceScope device(op, input.device());
    TORCH_CHECK_NOT_IMPLEMENTED(kernels::region_backward_fits(params, device.most_shared_bytes()), op,
                                ": expected a window and an upsampling whose gradient tile fits into ",
                                device.most_shared_bytes() / 1024,
                                " KiB of shared memory on CUDA, got radius [", params.radius[0], ", ",
                                params.radius[1], ", ", params.radius[2], "] and input ", input.sizes(),
                                " for ", params.size[1], " x ", params.size[2], " labels");
    const int64_t bytes =
        kernels::region_partials(params) * static_cast<int64_t>(sizeof(kernels::RegionPartial));
    const at::Tensor partials = at::empty({bytes}, input.options().dtype(at::kByte));
    auto* scratch = static_cast<kernels::RegionPartial*>(partials.mutable_data_ptr());
    C10_CUDA_CHECK(with_logit_type(params.logit, [&](auto logit) {
      return kernels::region_cross_entropy_forward<decltype(logit)>(params, state, scratch, device.stream());
    }));
  }

  static void backward(const char* op, const at::Tensor& input, const Params& params, const State& state,
                       const Grad& grad) {
    const DeviceScope device(op, input.device());
    C10_CUDA_CHECK(with_logit_type(params.logit, [&](auto logit) {
      return kernels::region_cross_entropy_backward<decltype(logit)>(
          params, state, grad, device.most_shared_bytes(), device.stream());
    }));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CUDA, m) {
  RegionCrossEntropyOps<CudaBackend>::implement(m);
}

}  // namespace dynplan
