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
using kernels::ReducedDtype;

at::Tensor view(const void* data, int64_t n, int64_t k, at::ScalarType type) {
  return at::from_blob(const_cast<void*>(data), {n, k}, at::TensorOptions().dtype(type));
}

constexpr auto int8_product = [](int64_t rows, int64_t columns, int64_t depth, const void* a,
                                 const void* weight, void* out) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor sums = view(out, rows, columns, at::kInt);
  at::_int_mm_out(sums, view(a, rows, depth, at::kChar), view(weight, columns, depth, at::kChar).t());
};

constexpr auto bfloat16_product = [](int64_t rows, int64_t columns, int64_t depth, const void* a,
                                     const void* weight, void* out) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor sums = view(out, rows, columns, at::kBFloat16);
  at::mm_out(sums, view(a, rows, depth, at::kBFloat16), view(weight, columns, depth, at::kBFloat16).t());
};

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
      int8_product(rows, kColumns, kDepth, a.const_data_ptr(), b.const_data_ptr(), sums.data());
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

// Elsewhere than on a CPU that multiplies bfloat16 itself oneDNN takes three to five times as long for it as
// for float32.
bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return kernels::cpu_isa() == kernels::CpuIsa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

template <class Element, class T>
void pack_into(const std::vector<at::Tensor>& w, EncoderSizes sizes, void* blob) {
  const auto data = [&](int index) { return static_cast<const T*>(w[index].const_data_ptr()); };
  kernels::pack_reduced_weights<Element, T>({data(0), data(1), data(2), data(3), data(4), data(5), data(6),
                                             data(7), data(8), data(9), data(10), data(11)},
                                            sizes.hidden, sizes.intermediate, int8_weight_levels(), blob);
}

at::Tensor pack_reduced_encoder_weights_cpu(at::TensorList weights, c10::string_view name) {
  const EncoderSizes sizes = check_pack_encoder_weights("pack_reduced_encoder_weights", weights);
  const ReducedDtype dtype = parse_reduced_dtype(name);
  // _int_mm of torch 2.13 is wrong where the inner dimension is 1 (its strides look like a transpose's).
  TORCH_CHECK_VALUE(sizes.hidden > 1 && sizes.intermediate > 1,
                    "pack_reduced_encoder_weights: expected sizes of at least 2, got H = ", sizes.hidden,
                    ", I = ", sizes.intermediate);
  std::vector<at::Tensor> dense;
  for (const at::Tensor& weight : weights) dense.push_back(weight.contiguous());
  const kernels::ReducedLayout layout(dtype, sizes.hidden, sizes.intermediate);
  at::Tensor blob = empty_for_weights(layout.bytes);
  void* out = blob.mutable_data_ptr();
  const bool float32 = weights[0].scalar_type() == at::kFloat;
  if (dtype == ReducedDtype::int8)
    float32 ? pack_into<int8_t, float>(dense, sizes, out) : pack_into<int8_t, BFloat16>(dense, sizes, out);
  else
    float32 ? pack_into<BFloat16, float>(dense, sizes, out)
            : pack_into<BFloat16, BFloat16>(dense, sizes, out);
  return blob;
}

}  // namespace

kernels::ReducedProduct torch_product(ReducedDtype dtype) {
  if (dtype == ReducedDtype::int8) return int8_product;
  return bfloat16_product;
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def("_int8_weight_levels() -> int", &int8_weight_levels);
  m.def("_multiplies_bfloat16() -> bool", &multiplies_bfloat16);
}

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("pack_reduced_encoder_weights", &pack_reduced_encoder_weights_cpu);
}

}  // namespace dynplan
