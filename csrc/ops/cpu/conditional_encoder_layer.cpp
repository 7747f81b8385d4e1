#include "ops/cpu/conditional_encoder_layer.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "ops/conditional_encoder_layer.h"
#include "ops/cpu/encoder_phases.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/reduced_product.h"

namespace dynplan {
namespace {

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
  const PackedStack weights = read_packed(op, call.packed_weights, call.width());

  const at::Tensor dense = hidden.contiguous();
  at::Tensor out = at::empty(hidden.sizes(), hidden.options());
  if (dense.nbytes() > 0) std::memcpy(out.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
  if (most == 0) return out;
  run_encoder({.hidden = out.mutable_data_ptr(),
               .row_type = hidden.scalar_type() == at::kFloat ? kernels::RowType::float32
                                                              : kernels::RowType::bfloat16,
               .rows = rows,
               .cu_seqlens = cu_seqlens,
               .counts = counts,
               .layers = call.layers(),
               .capacity = call.capacity(),
               .samples = call.samples(),
               .hidden_size = call.width(),
               .heads = call.num_heads,
               .activation = call.activation,
               .eps = call.eps},
              weights, most);
  return out;
}

}  // namespace

PackedStack read_packed(const char* op, at::TensorList packed_weights, int64_t width) {
  PackedStack stack;
  std::vector<std::pair<const void*, int64_t>> checked;
  // One short text finds none of the headers in cache: all are asked for before the first is looked at.
  for (const at::Tensor& blob : packed_weights) __builtin_prefetch(blob.const_data_ptr());
  for (const at::Tensor& blob : packed_weights) {
    const bool is_dense = blob.is_contiguous() && kernels::is_aligned(blob.const_data_ptr());
    if (!is_dense) stack.dense.push_back(blob.clone(at::MemoryFormat::Contiguous));
    stack.blobs.push_back((is_dense ? blob : stack.dense.back()).const_data_ptr());
    checked.emplace_back(stack.blobs.back(), blob.numel());
  }
  std::string problem;
  const auto shape = kernels::check_all_packed(checked, width, problem);
  TORCH_CHECK_VALUE(shape, op, ": expected ", problem);
  stack.shape = *shape;
  return stack;
}

void run_encoder(kernels::ConditionalEncoderParams p, const PackedStack& weights, int64_t most,
                 int64_t first) {
  const int64_t intermediate = weights.shape.intermediate_size;
  const bool int8 = weights.shape.type == kernels::WeightType::int8;
  const int64_t floats = int8 ? kernels::reduced_workspace_floats(most, p.hidden_size, intermediate)
                              : kernels::encoder_workspace_floats(most, p.hidden_size, intermediate);
  const at::Tensor workspace = at::empty({floats}, at::TensorOptions().dtype(at::kFloat));
  p.packed = weights.blobs.data() + first;
  p.intermediate_size = intermediate;
  p.workers = at::get_num_threads();
  p.workspace = workspace.mutable_data_ptr<float>();
  p.phases = encoder_phase_times();
  if (int8)
    kernels::reduced_encoder(p, torch_int8_product(), at_parallel);
  else
    kernels::conditional_encoder(p, at_parallel);
}

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("conditional_encoder_layer", &conditional_encoder_layer<conditional_encoder_cpu>);
  m.impl("conditional_encoder", &conditional_encoder<conditional_encoder_cpu>);
}

}  // namespace dynplan
