#include "ops/reduced_encoder.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <vector>

#include "ops/conditional_encoder_layer.h"
#include "ops/cpu/huge_pages.h"
#include "ops/cpu/reduced_product.h"

namespace dynplan {
namespace {

using kernels::BFloat16;
using kernels::WeightType;

at::Tensor view(const void* data, int64_t n, int64_t k, at::ScalarType type) {
  return at::from_blob(const_cast<void*>(data), {n, k}, at::TensorOptions().dtype(type));
}

void multiply_int8(int64_t rows, int64_t columns, int64_t depth, const int8_t* a, const int8_t* weight,
                   int32_t* out) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor sums = view(out, rows, columns, at::kInt);
  at::_int_mm_out(sums, view(a, rows, depth, at::kChar), view(weight, columns, depth, at::kChar).t());
}

template <class T>
kernels::EncoderLayerTensors<T> layer_tensors(const std::vector<at::Tensor>& w) {
  const auto data = [&](int index) { return static_cast<const T*>(w[index].const_data_ptr()); };
  return {data(0), data(1), data(2), data(3), data(4),  data(5),
          data(6), data(7), data(8), data(9), data(10), data(11)};
}

// Whether _int_mm adds products of magnitude 127 exactly. Without VNNI instructions oneDNN adds pairs of
// products in 16 bits, which clip.
bool sums_are_exact() {
  constexpr int64_t kDepth = 256, kColumns = 32;
  const at::TensorOptions bytes = at::TensorOptions().dtype(at::kChar);
  for (const int64_t rows : {1, 8, 64})
    for (const int64_t sign : {1, -1}) {
      const at::Tensor a = at::full({rows, kDepth}, 127, bytes),
                       b = at::full({kColumns, kDepth}, sign * 127, bytes);
      std::vector<int32_t> sums(rows * kColumns);
      multiply_int8(rows, kColumns, kDepth, a.const_data_ptr<int8_t>(), b.const_data_ptr<int8_t>(),
                    sums.data());
      for (const int32_t sum : sums)
        if (sum != sign * 127 * 127 * kDepth) return false;
    }
  return true;
}

// Largest magnitude of an int8 weight. 64 where sums clip: oneDNN makes a row's 127 an unsigned 255, and
// 2 * 255 * 64 < 2^15.
int64_t int8_weight_levels() {
  static const int64_t levels = sums_are_exact() ? kernels::kRowLevels : 64;
  return levels;
}

// As encoder/pairs.h decides it.
bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return kernels::cpu_isa() == kernels::CpuIsa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

template <class T>
at::Tensor pack_into(WeightType type, const std::vector<at::Tensor>& dense, EncoderSizes sizes) {
  const auto [h, i] = sizes;
  const bool int8 = type == WeightType::int8;
  const at::Tensor blob = empty_for_weights(int8 ? kernels::ReducedLayout(h, i).bytes
                                                 : kernels::PackedLayout(type, h, i).bytes());
  if (int8)
    kernels::pack_reduced_weights(layer_tensors<T>(dense), h, i, int8_weight_levels(),
                                  blob.mutable_data_ptr());
  else
    kernels::pack_encoder_weights(type, layer_tensors<T>(dense), h, i, blob.mutable_data_ptr());
  return blob;
}

at::Tensor pack_checked(WeightType type, at::TensorList weights, EncoderSizes sizes) {
  std::vector<at::Tensor> dense;
  for (const at::Tensor& weight : weights) dense.push_back(weight.contiguous());
  return weights[0].scalar_type() == at::kFloat ? pack_into<float>(type, dense, sizes)
                                                : pack_into<BFloat16>(type, dense, sizes);
}

at::Tensor pack_encoder_weights_cpu(at::TensorList weights) {
  return pack_checked(WeightType::float32, weights,
                      check_pack_encoder_weights("pack_encoder_weights", weights));
}

at::Tensor pack_reduced_encoder_weights_cpu(at::TensorList weights, c10::string_view dtype) {
  const EncoderSizes sizes = check_pack_encoder_weights("pack_reduced_encoder_weights", weights);
  const WeightType type = parse_reduced_dtype(dtype);
  // _int_mm of torch 2.13 is wrong where the inner dimension is 1 (its strides look like a transpose's).
  TORCH_CHECK_VALUE(type != WeightType::int8 || (sizes.hidden > 1 && sizes.intermediate > 1),
                    "pack_reduced_encoder_weights: expected sizes of at least 2 for int8, got H = ",
                    sizes.hidden, ", I = ", sizes.intermediate);
  return pack_checked(type, weights, sizes);
}

}  // namespace

kernels::ReducedProduct torch_int8_product() {
  static constexpr auto product = &multiply_int8;
  return product;
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def("_int8_weight_levels() -> int", &int8_weight_levels);
  m.def("_multiplies_bfloat16() -> bool", &multiplies_bfloat16);
}

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("pack_encoder_weights", &pack_encoder_weights_cpu);
  m.impl("pack_reduced_encoder_weights", &pack_reduced_encoder_weights_cpu);
}

}  // namespace dynplan
