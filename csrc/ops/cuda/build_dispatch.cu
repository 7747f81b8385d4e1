#include <torch/library.h>

#include "kernels/packing/cuda/build_dispatch.cuh"
#include "ops/build_dispatch.h"
#include "ops/cuda/launch.h"

namespace dynplan {
namespace {

DispatchTensors build_dispatch_cuda(const at::Tensor& keep, const at::Tensor& cu_seqlens, int64_t capacity) {
  const BuildDispatchCall call = begin_build_dispatch(keep, cu_seqlens, capacity);
  const DeviceScope device("build_dispatch", keep.device());
  C10_CUDA_CHECK(kernels::build_dispatch_cuda(call.params, device.stream()));
  return call.results;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CUDA, m) {
  m.impl("build_dispatch", &build_dispatch_cuda);
}

}  // namespace dynplan
