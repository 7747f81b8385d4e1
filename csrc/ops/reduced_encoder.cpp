#include "ops/reduced_encoder.h"

#include <torch/library.h>

#include <string>

namespace dynplan {

kernels::WeightType parse_reduced_dtype(std::string_view dtype) {
  TORCH_CHECK_VALUE(dtype == "int8" || dtype == "bfloat16",
                    "pack_reduced_encoder_weights: expected dtype to be int8 or bfloat16, got ",
                    std::string(dtype));
  return dtype == "int8" ? kernels::WeightType::int8 : kernels::WeightType::bfloat16;
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def("pack_reduced_encoder_weights(Tensor[] weights, str dtype) -> Tensor", {at::Tag::pt2_compliant_tag});
}

}  // namespace dynplan
