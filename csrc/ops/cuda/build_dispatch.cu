#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "kernels/build_dispatch.cuh"
#include "ops/build_dispatch.h"
#include "ops/cuda/launch.h"

namespace dynplan {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> build_dispatch_cuda(const at::Tensor& keep,
                                                                   const at::Tensor& cu_seqlens,
                                                                   int64_t capacity) {
  check_build_dispatch(keep, cu_seqlens, capacity);
  const DeviceScope device("build_dispatch", keep.device());
  const at::Tensor offsets = cu_seqlens.contiguous();
  const bool all_layers = keep.dim() == 2;
  const int64_t samples = keep.size(0);
  const auto shape = [&](int64_t last) {
    return all_layers ? std::vector<int64_t>{keep.size(1), last} : std::vector<int64_t>{last};
  };
  at::Tensor rows = at::empty(shape(capacity), offsets.options());
  at::Tensor active_cu_seqlens = at::empty(shape(samples + 1), offsets.options());
  at::Tensor counts = at::empty(shape(2), offsets.options());
  C10_CUDA_CHECK(
      kernels::build_dispatch_cuda({.keep = keep.const_data_ptr<bool>(),
                                    .sample_stride = keep.stride(0),
                                    .layer_stride = all_layers ? keep.stride(1) : 0,
                                    .cu_seqlens = offsets.const_data_ptr<int32_t>(),
                                    .samples = samples,
                                    .layers = all_layers ? keep.size(1) : 1,
                                    .capacity = capacity,
                                    .rows = rows.mutable_data_ptr<int32_t>(),
                                    .active_cu_seqlens = active_cu_seqlens.mutable_data_ptr<int32_t>(),
                                    .counts = counts.mutable_data_ptr<int32_t>()},
                                   device.stream()));
  return {rows, active_cu_seqlens, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CUDA, m) {
  m.impl("build_dispatch", &build_dispatch_cuda);
}

}  // namespace dynplan
