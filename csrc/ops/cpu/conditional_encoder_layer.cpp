#include "kernels/conditional_encoder_layer.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels/encoder/checks.h"
#include "ops/conditional_encoder_layer.h"
#include "ops/cpu/encoder_phases.h"
#include "ops/cpu/huge_pages.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/reduced_product.h"

namespace dynplan {
namespace {

template <class T>
void pack_into(const std::vector<at::Tensor>& w, EncoderSizes sizes, void* blob) {
  const auto data = [&](int index) { return static_cast<const T*>(w[index].const_data_ptr()); };
  kernels::pack_encoder_weights<T>({data(0), data(1), data(2), data(3), data(4), data(5), data(6), data(7),
                                    data(8), data(9), data(10), data(11)},
                                   sizes.hidden, sizes.intermediate, blob);
}

at::Tensor pack_encoder_weights_cpu(at::TensorList weights) {
  const EncoderSizes sizes = check_pack_encoder_weights("pack_encoder_weights", weights);
  std::vector<at::Tensor> dense;
  for (const at::Tensor& weight : weights) dense.push_back(weight.contiguous());
  const kernels::PackedLayout layout(sizes.hidden, sizes.intermediate);
  at::Tensor blob = empty_for_weights(layout.bytes());
  if (weights[0].scalar_type() == at::kFloat)
    pack_into<float>(dense, sizes, blob.mutable_data_ptr());
  else
    pack_into<kernels::BFloat16>(dense, sizes, blob.mutable_data_ptr());
  return blob;
}

at::Tensor conditional_encoder_cpu(const EncoderCall& call) {
  const at::Tensor& hidden = call.hidden;
  const char* const op = call.op;
  TORCH_CHECK_TYPE(hidden.scalar_type() == at::kFloat || hidden.scalar_type() == at::kBFloat16, op,
                   ": expected hidden to be float32 or bfloat16, got ", hidden.scalar_type());
  const int32_t *rows = call.rows.const_data_ptr<int32_t>(),
                *cu_seqlens = call.cu_seqlens.const_data_ptr<int32_t>(),
                *counts = call.counts.const_data_ptr<int32_t>();
  std::string problem;
  const int64_t most = kernels::check_dispatch({.rows = rows,
                                                .cu_seqlens = cu_seqlens,
                                                .counts = counts,
                                                .layers = call.layers(),
                                                .capacity = call.capacity(),
                                                .samples = call.samples()},
                                               problem);
  TORCH_CHECK_VALUE(most >= 0, op, ": expected ", problem);
  std::vector<at::Tensor> blobs;
  std::vector<const void*> packed;
  int64_t intermediate = 0;
  std::optional<kernels::ReducedDtype> reduced;
  for (const at::Tensor& blob : call.packed_weights) {
    blobs.push_back(blob.contiguous());
    packed.push_back(blobs.back().const_data_ptr());
    if (packed.size() == 1) reduced = kernels::reduced_dtype(packed[0], blob.numel());
    const int64_t width =
        reduced ? kernels::check_reduced(packed.back(), blob.numel(), *reduced, call.width(), problem)
                : kernels::check_packed(packed.back(), blob.numel(), call.width(), problem);
    TORCH_CHECK_VALUE(width >= 0, op, ": expected ", problem);
    if (intermediate == 0) intermediate = width;
    TORCH_CHECK_VALUE(width == intermediate, op, ": expected packed_weights of one feed-forward width, got ",
                      intermediate, " and ", width);
  }

  at::Tensor out = at::empty(hidden.sizes(), hidden.options());
  out.copy_(hidden);
  if (most == 0) return out;
  const int64_t floats = reduced ? kernels::reduced_workspace_floats(most, call.width(), intermediate)
                                 : kernels::encoder_workspace_floats(most, call.width(), intermediate);
  const at::Tensor workspace = at::empty({floats}, hidden.options().dtype(at::kFloat));
  const kernels::ConditionalEncoderParams params = {
      .hidden = out.mutable_data_ptr(),
      .row_type = hidden.scalar_type() == at::kFloat ? kernels::RowType::float32 : kernels::RowType::bfloat16,
      .rows = rows,
      .cu_seqlens = cu_seqlens,
      .counts = counts,
      .packed = packed.data(),
      .layers = call.layers(),
      .capacity = call.capacity(),
      .samples = call.samples(),
      .hidden_size = call.width(),
      .intermediate_size = intermediate,
      .heads = call.num_heads,
      .activation = call.activation,
      .eps = call.eps,
      .workers = at::get_num_threads(),
      .workspace = workspace.mutable_data_ptr<float>(),
      .phases = encoder_phase_times()};
  if (reduced)
    kernels::reduced_encoder(params, torch_product(*reduced), at_parallel);
  else
    kernels::conditional_encoder(params, at_parallel);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("pack_encoder_weights", &pack_encoder_weights_cpu);
  m.impl("conditional_encoder_layer", &conditional_encoder_layer<conditional_encoder_cpu>);
  m.impl("conditional_encoder", &conditional_encoder<conditional_encoder_cpu>);
}

}  // namespace dynplan
