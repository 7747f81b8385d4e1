#include "ops/conditional_encoder_layer.h"

#include <torch/library.h>

#include <array>
#include <utility>

namespace dynplan {
namespace {

void check_int32(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& hidden,
                 at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt, op, ": expected ", argument, " to be int32, got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": expected ", argument, " to have shape ", shape, ", got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == hidden.device(), op, ": expected ", argument, " on ", hidden.device(),
                    ", got ", tensor.device());
}

}  // namespace

EncoderSizes check_pack_encoder_weights(const char* op, at::TensorList weights) {
  constexpr const char* kNames[12] = {"qkv_weight",   "qkv_bias",   "output_weight", "output_bias",
                                      "norm1_weight", "norm1_bias", "up_weight",     "up_bias",
                                      "down_weight",  "down_bias",  "norm2_weight",  "norm2_bias"};
  TORCH_CHECK_VALUE(weights.size() == 12, op, ": expected weights to be 12 tensors, got ", weights.size());
  TORCH_CHECK_VALUE(weights[2].dim() == 2, op, ": expected output_weight to have shape (H, H), got ",
                    weights[2].sizes());
  TORCH_CHECK_VALUE(weights[6].dim() == 2, op, ": expected up_weight to have shape (I, H), got ",
                    weights[6].sizes());
  const int64_t h = weights[2].size(0), i = weights[6].size(0);
  const std::array<std::array<int64_t, 2>, 12> shapes = {
      {{3 * h, h}, {3 * h}, {h, h}, {h}, {h}, {h}, {i, h}, {i}, {h, i}, {h}, {h}, {h}}};
  constexpr bool kMatrix[12] = {true, false, true, false, false, false,
                                true, false, true, false, false, false};
  for (size_t w = 0; w < 12; ++w) {
    const at::IntArrayRef shape(shapes[w].data(), kMatrix[w] ? 2 : 1);
    TORCH_CHECK_VALUE(weights[w].sizes() == shape, op, ": expected ", kNames[w], " to have shape ", shape,
                      ", got ", weights[w].sizes());
    TORCH_CHECK_TYPE(weights[w].scalar_type() == weights[0].scalar_type(), op, ": expected ", kNames[w],
                     " to be ", weights[0].scalar_type(), " like qkv_weight, got ", weights[w].scalar_type());
    TORCH_CHECK_VALUE(weights[w].device() == weights[0].device(), op, ": expected ", kNames[w], " on ",
                      weights[0].device(), ", got ", weights[w].device());
  }
  const bool half = weights[0].is_cuda() && weights[0].scalar_type() == at::kHalf;
  TORCH_CHECK_TYPE(
      weights[0].scalar_type() == at::kFloat || weights[0].scalar_type() == at::kBFloat16 || half, op,
      ": expected weights to be float32 or bfloat16 (on CUDA also float16), got ", weights[0].scalar_type());
  TORCH_CHECK_VALUE(h > 0 && i > 0, op, ": expected sizes to be positive, got H = ", h, ", I = ", i);
  return {h, i};
}

kernels::Activation check_encoder_options(const char* op, int64_t width, at::TensorList packed_weights,
                                          at::ScalarType wanted, int64_t num_heads,
                                          std::string_view activation, at::Device device) {
  TORCH_CHECK_VALUE(num_heads > 0 && width % num_heads == 0, op, ": expected num_heads to divide the width ",
                    width, ", got ", num_heads);
  for (const at::Tensor& packed : packed_weights) {
    TORCH_CHECK_VALUE(packed.device() == device, op, ": expected packed_weights on ", device, ", got ",
                      packed.device());
    TORCH_CHECK_TYPE(packed.scalar_type() == wanted, op,
                     ": expected packed_weights of pack_encoder_weights to be ", wanted, ", got ",
                     packed.scalar_type());
  }
  const std::optional<kernels::Activation> chosen = kernels::activation_of(activation);
  TORCH_CHECK_VALUE(chosen.has_value(), op, ": expected activation to be one of ", kernels::kActivationNames,
                    ", got ", std::string(activation));
  return *chosen;
}

EncoderCall check_conditional_encoder(const char* op, const at::Tensor& hidden, const at::Tensor& rows,
                                      const at::Tensor& cu_seqlens, const at::Tensor& counts,
                                      at::TensorList packed_weights, int64_t num_heads,
                                      std::string_view activation, double eps) {
  TORCH_CHECK_VALUE(hidden.dim() == 2, op, ": expected hidden to have shape (T, H), got ", hidden.sizes());
  const kernels::Activation chosen = check_encoder_options(
      op, hidden.size(1), packed_weights, hidden.is_cuda() ? hidden.scalar_type() : at::kByte, num_heads,
      activation, hidden.device());
  TORCH_CHECK_VALUE(cu_seqlens.dim() == rows.dim() && cu_seqlens.size(-1) >= 1, op,
                    ": expected cu_seqlens to have as many dimensions as rows and an offset at least, got ",
                    cu_seqlens.sizes());
  const int64_t layers = static_cast<int64_t>(packed_weights.size());
  const auto shape = [&](int64_t last) {
    return rows.dim() == 2 ? std::vector<int64_t>{layers, last} : std::vector<int64_t>{last};
  };
  check_int32(op, "rows", rows, hidden, shape(hidden.size(0)));
  check_int32(op, "cu_seqlens", cu_seqlens, hidden, shape(cu_seqlens.size(-1)));
  check_int32(op, "counts", counts, hidden, shape(2));
  return {
      op,        hidden, rows.contiguous(),      cu_seqlens.contiguous(), counts.contiguous(), packed_weights,
      num_heads, chosen, static_cast<float>(eps)};
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def("pack_encoder_weights(Tensor[] weights) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "conditional_encoder_layer(Tensor hidden, Tensor rows, Tensor cu_seqlens, Tensor counts, "
      "Tensor packed_weights, int num_heads, str activation, float eps) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "conditional_encoder(Tensor hidden, Tensor rows, Tensor cu_seqlens, Tensor counts, "
      "Tensor[] packed_weights, int num_heads, str activation, float eps) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace dynplan
