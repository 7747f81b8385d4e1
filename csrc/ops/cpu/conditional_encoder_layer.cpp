#include "kernels/conditional_encoder_layer.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "kernels/encoder/checks.h"
#include "ops/conditional_encoder_layer.h"
#include "ops/cpu/encoder_phases.h"
#include "ops/cpu/parallel.h"

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
  const EncoderSizes sizes = check_pack_encoder_weights(weights);
  std::vector<at::Tensor> dense;
  for (const at::Tensor& weight : weights) dense.push_back(weight.contiguous());
  const kernels::PackedLayout layout(sizes.hidden, sizes.intermediate);
  at::Tensor blob = at::empty({layout.bytes()}, weights[0].options().dtype(at::kByte));
  if (weights[0].scalar_type() == at::kFloat)
    pack_into<float>(dense, sizes, blob.mutable_data_ptr());
  else
    pack_into<kernels::BFloat16>(dense, sizes, blob.mutable_data_ptr());
  return blob;
}

at::Tensor run(const char* op, const at::Tensor& hidden, const at::Tensor& rows, const at::Tensor& cu_seqlens,
               const at::Tensor& counts, at::TensorList packed_weights, int64_t num_heads,
               c10::string_view activation, double eps) {
  check_conditional_encoder(op, hidden, rows, cu_seqlens, counts, packed_weights, num_heads);
  const kernels::Activation chosen = parse_activation(op, activation);
  TORCH_CHECK_TYPE(hidden.scalar_type() == at::kFloat || hidden.scalar_type() == at::kBFloat16, op,
                   ": expected hidden to be float32 or bfloat16, got ", hidden.scalar_type());
  const int64_t layers = static_cast<int64_t>(packed_weights.size());
  const at::Tensor dense_rows = rows.contiguous(), offsets = cu_seqlens.contiguous(),
                   dense_counts = counts.contiguous();
  std::string problem;
  const int64_t most = kernels::check_dispatch({.rows = dense_rows.const_data_ptr<int32_t>(),
                                                .cu_seqlens = offsets.const_data_ptr<int32_t>(),
                                                .counts = dense_counts.const_data_ptr<int32_t>(),
                                                .layers = layers,
                                                .capacity = hidden.size(0),
                                                .samples = offsets.size(-1) - 1},
                                               problem);
  TORCH_CHECK_VALUE(most >= 0, op, ": expected ", problem);
  std::vector<at::Tensor> blobs;
  std::vector<const void*> packed;
  int64_t intermediate = 0;
  for (const at::Tensor& blob : packed_weights) {
    blobs.push_back(blob.contiguous());
    packed.push_back(blobs.back().const_data_ptr());
    const int64_t width = kernels::check_packed(packed.back(), blob.numel(), hidden.size(1), problem);
    TORCH_CHECK_VALUE(width >= 0, op, ": expected ", problem);
    if (intermediate == 0) intermediate = width;
    TORCH_CHECK_VALUE(width == intermediate, op, ": expected packed_weights of one feed-forward width, got ",
                      intermediate, " and ", width);
  }

  at::Tensor out = at::empty(hidden.sizes(), hidden.options());
  out.copy_(hidden);
  if (most == 0) return out;
  const at::Tensor workspace =
      at::empty({kernels::encoder_workspace_floats(most, hidden.size(1), intermediate)},
                hidden.options().dtype(at::kFloat));
  kernels::conditional_encoder({.hidden = out.mutable_data_ptr(),
                                .row_type = hidden.scalar_type() == at::kFloat ? kernels::RowType::float32
                                                                               : kernels::RowType::bfloat16,
                                .rows = dense_rows.const_data_ptr<int32_t>(),
                                .cu_seqlens = offsets.const_data_ptr<int32_t>(),
                                .counts = dense_counts.const_data_ptr<int32_t>(),
                                .packed = packed.data(),
                                .layers = layers,
                                .capacity = hidden.size(0),
                                .samples = offsets.size(-1) - 1,
                                .hidden_size = hidden.size(1),
                                .intermediate_size = intermediate,
                                .heads = num_heads,
                                .activation = chosen,
                                .eps = static_cast<float>(eps),
                                .workers = at::get_num_threads(),
                                .workspace = workspace.mutable_data_ptr<float>(),
                                .phases = encoder_phase_times()},
                               at_parallel);
  return out;
}

at::Tensor conditional_encoder_layer_cpu(const at::Tensor& hidden, const at::Tensor& rows,
                                         const at::Tensor& cu_seqlens, const at::Tensor& counts,
                                         const at::Tensor& packed_weights, int64_t num_heads,
                                         c10::string_view activation, double eps) {
  return run("conditional_encoder_layer", hidden, rows, cu_seqlens, counts, packed_weights, num_heads,
             activation, eps);
}

at::Tensor conditional_encoder_cpu(const at::Tensor& hidden, const at::Tensor& rows,
                                   const at::Tensor& cu_seqlens, const at::Tensor& counts,
                                   at::TensorList packed_weights, int64_t num_heads,
                                   c10::string_view activation, double eps) {
  return run("conditional_encoder", hidden, rows, cu_seqlens, counts, packed_weights, num_heads, activation,
             eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("pack_encoder_weights", &pack_encoder_weights_cpu);
  m.impl("conditional_encoder_layer", &conditional_encoder_layer_cpu);
  m.impl("conditional_encoder", &conditional_encoder_cpu);
}

}  // namespace dynplan
