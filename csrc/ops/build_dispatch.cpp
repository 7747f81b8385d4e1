#include "ops/build_dispatch.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <vector>

namespace dynplan {

BuildDispatchCall begin_build_dispatch(const at::Tensor& keep, const at::Tensor& cu_seqlens,
                                       int64_t capacity) {
  TORCH_CHECK_TYPE(keep.scalar_type() == at::kBool, "build_dispatch: expected keep to be bool, got ",
                   keep.scalar_type());
  TORCH_CHECK_VALUE(keep.dim() == 1 || keep.dim() == 2,
                    "build_dispatch: expected keep to have shape (B,) or (B, L), got ", keep.sizes());
  TORCH_CHECK_TYPE(cu_seqlens.scalar_type() == at::kInt,
                   "build_dispatch: expected cu_seqlens to be int32, got ", cu_seqlens.scalar_type());
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) == keep.size(0) + 1,
                    "build_dispatch: expected cu_seqlens to have shape [", keep.size(0) + 1, "], got ",
                    cu_seqlens.sizes());
  TORCH_CHECK_VALUE(cu_seqlens.device() == keep.device(), "build_dispatch: expected cu_seqlens on ",
                    keep.device(), ", got ", cu_seqlens.device());
  TORCH_CHECK_VALUE(capacity >= 0 && capacity <= std::numeric_limits<int32_t>::max(),
                    "build_dispatch: expected capacity in [0, 2^31), got ", capacity);

  const bool all_layers = keep.dim() == 2;
  const int64_t samples = keep.size(0);
  const at::Tensor offsets = cu_seqlens.contiguous();
  const auto allocate = [&](int64_t last) {
    return at::empty(all_layers ? std::vector<int64_t>{keep.size(1), last} : std::vector<int64_t>{last},
                     offsets.options());
  };
  const at::Tensor rows = allocate(capacity), active_cu_seqlens = allocate(samples + 1), counts = allocate(2);
  return {offsets,
          {rows, active_cu_seqlens, counts},
          {.keep = kernels::truths(keep.const_data_ptr()),
           .sample_stride = keep.stride(0),
           .layer_stride = all_layers ? keep.stride(1) : 0,
           .cu_seqlens = offsets.const_data_ptr<int32_t>(),
           .samples = samples,
           .layers = all_layers ? keep.size(1) : 1,
           .capacity = capacity,
           .rows = rows.mutable_data_ptr<int32_t>(),
           .active_cu_seqlens = active_cu_seqlens.mutable_data_ptr<int32_t>(),
           .counts = counts.mutable_data_ptr<int32_t>()}};
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def("build_dispatch(Tensor keep, Tensor cu_seqlens, SymInt capacity) -> (Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace dynplan
