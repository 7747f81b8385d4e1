#include "ops/pack.h"

#include <torch/library.h>

#include <limits>

namespace dynplan {

void check_pack(const at::Tensor& hidden, const at::Tensor& attention_mask) {
  TORCH_CHECK_VALUE(hidden.dim() == 3, "pack: expected hidden to have shape (B, S, H), got ", hidden.sizes());
  TORCH_CHECK_VALUE(attention_mask.dim() == 2 && attention_mask.size(0) == hidden.size(0) &&
                        attention_mask.size(1) == hidden.size(1),
                    "pack: expected attention_mask to have shape [", hidden.size(0), ", ", hidden.size(1),
                    "], got ", attention_mask.sizes());
  TORCH_CHECK_TYPE(at::isIntegralType(attention_mask.scalar_type(), /*includeBool=*/true),
                   "pack: expected attention_mask to be bool or integer, got ", attention_mask.scalar_type());
  TORCH_CHECK_VALUE(attention_mask.device() == hidden.device(), "pack: expected attention_mask on ",
                    hidden.device(), ", got ", attention_mask.device());
  TORCH_CHECK_VALUE(hidden.size(0) * hidden.size(1) <= std::numeric_limits<int32_t>::max(),
                    "pack: expected at most 2^31 - 1 positions, got ", hidden.size(0) * hidden.size(1));
}

void check_unpack(const at::Tensor& packed, const at::Tensor& indices, int64_t batch_size, int64_t length) {
  TORCH_CHECK_VALUE(packed.dim() == 2, "unpack: expected packed to have shape (T, H), got ", packed.sizes());
  TORCH_CHECK_VALUE(indices.dim() == 1 && indices.size(0) == packed.size(0),
                    "unpack: expected indices to have shape [", packed.size(0), "], got ", indices.sizes());
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kInt, "unpack: expected indices to be int32, got ",
                   indices.scalar_type());
  TORCH_CHECK_VALUE(indices.device() == packed.device(), "unpack: expected indices on ", packed.device(),
                    ", got ", indices.device());
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(batch_size >= 0 && batch_size <= kMost,
                    "unpack: expected batch_size in [0, 2^31), got ", batch_size);
  TORCH_CHECK_VALUE(length >= 0 && length <= kMost, "unpack: expected length in [0, 2^31), got ", length);
}

void check_unpack_backward(const at::Tensor& grad, const at::Tensor& indices) {
  TORCH_CHECK_VALUE(grad.dim() == 3, "_unpack_backward: expected grad to have shape (B, S, H), got ",
                    grad.sizes());
  TORCH_CHECK_VALUE(indices.dim() == 1 && indices.scalar_type() == at::kInt,
                    "_unpack_backward: expected indices to be int32 of shape (T,), got ",
                    indices.scalar_type(), " of shape ", indices.sizes());
  TORCH_CHECK_VALUE(indices.device() == grad.device(), "_unpack_backward: expected indices on ",
                    grad.device(), ", got ", indices.device());
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def("pack(Tensor hidden, Tensor attention_mask) -> (Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def("unpack(Tensor packed, Tensor indices, SymInt batch_size, SymInt length) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("_unpack_backward(Tensor grad, Tensor indices) -> Tensor", {at::Tag::pt2_compliant_tag});
}

}  // namespace dynplan
