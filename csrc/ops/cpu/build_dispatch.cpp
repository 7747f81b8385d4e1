#include "kernels/build_dispatch.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "ops/build_dispatch.h"
#include "ops/cpu/parallel.h"

namespace dynplan {
namespace {

void check_offsets(const at::Tensor& cu_seqlens, int64_t capacity) {
  const int32_t* offset = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t samples = cu_seqlens.size(0) - 1;
  TORCH_CHECK_VALUE(offset[0] == 0, "build_dispatch: expected cu_seqlens to start at 0, got ", offset[0]);
  for (int64_t b = 0; b < samples; ++b)
    TORCH_CHECK_VALUE(offset[b] <= offset[b + 1], "build_dispatch: expected cu_seqlens to ascend, got ",
                      offset[b], " then ", offset[b + 1], " at ", b);
  TORCH_CHECK_VALUE(offset[samples] <= capacity,
                    "build_dispatch: expected cu_seqlens to end within the capacity of ", capacity, ", got ",
                    offset[samples]);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> build_dispatch_cpu(const at::Tensor& keep,
                                                                  const at::Tensor& cu_seqlens,
                                                                  int64_t capacity) {
  check_build_dispatch(keep, cu_seqlens, capacity);
  const at::Tensor offsets = cu_seqlens.contiguous();
  check_offsets(offsets, capacity);
  const bool all_layers = keep.dim() == 2;
  const int64_t samples = keep.size(0);
  const auto shape = [&](int64_t last) {
    return all_layers ? std::vector<int64_t>{keep.size(1), last} : std::vector<int64_t>{last};
  };
  at::Tensor rows = at::empty(shape(capacity), offsets.options());
  at::Tensor active_cu_seqlens = at::empty(shape(samples + 1), offsets.options());
  at::Tensor counts = at::empty(shape(2), offsets.options());
  kernels::build_dispatch({.keep = keep.const_data_ptr<bool>(),
                           .sample_stride = keep.stride(0),
                           .layer_stride = all_layers ? keep.stride(1) : 0,
                           .cu_seqlens = offsets.const_data_ptr<int32_t>(),
                           .samples = samples,
                           .layers = all_layers ? keep.size(1) : 1,
                           .capacity = capacity,
                           .rows = rows.mutable_data_ptr<int32_t>(),
                           .active_cu_seqlens = active_cu_seqlens.mutable_data_ptr<int32_t>(),
                           .counts = counts.mutable_data_ptr<int32_t>()},
                          at_parallel);
  return {rows, active_cu_seqlens, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("build_dispatch", &build_dispatch_cpu);
}

}  // namespace dynplan
