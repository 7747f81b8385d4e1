#include "ops/build_dispatch.h"

#include <torch/library.h>

#include <limits>

namespace dynplan {

void check_build_dispatch(const at::Tensor& keep, const at::Tensor& cu_seqlens, int64_t capacity) {
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
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def("build_dispatch(Tensor keep, Tensor cu_seqlens, SymInt capacity) -> (Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace dynplan
