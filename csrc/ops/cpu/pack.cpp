#include "kernels/packing/pack.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "ops/cpu/pack.h"
#include "ops/cpu/parallel.h"
#include "ops/pack.h"

namespace dynplan {
namespace {

void check_indices(const char* op, const at::Tensor& indices, int64_t positions) {
  const int32_t* index = indices.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < indices.numel(); ++t)
    TORCH_CHECK_INDEX(index[t] >= -1 && index[t] < positions, op, ": expected indices in [-1, ", positions,
                      "), got ", index[t], " at ", t);
}

at::Tensor gather_rows(const at::Tensor& hidden, const at::Tensor& indices) {
  // Only a row must be dense; batches and positions may be strided, expanded or permuted.
  const at::Tensor source = hidden.size(2) <= 1 || hidden.stride(2) == 1 ? hidden : hidden.contiguous();
  const int64_t element = source.element_size();
  at::Tensor packed = at::empty({indices.size(0), source.size(2)}, source.options());
  kernels::pack_rows({.hidden = static_cast<const char*>(source.const_data_ptr()),
                      .batch_stride = source.stride(0) * element,
                      .length_stride = source.stride(1) * element,
                      .row_bytes = source.size(2) * element,
                      .length = source.size(1),
                      .indices = indices.const_data_ptr<int32_t>(),
                      .tokens = indices.size(0),
                      .packed = static_cast<char*>(packed.mutable_data_ptr())},
                     at_parallel);
  return packed;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pack_cpu(const at::Tensor& hidden,
                                                        const at::Tensor& attention_mask) {
  check_pack(hidden, attention_mask);
  const Tokens tokens = find_tokens("pack", attention_mask);
  return {gather_rows(hidden, tokens.indices), tokens.indices, tokens.cu_seqlens};
}

at::Tensor unpack_cpu(const at::Tensor& packed, const at::Tensor& indices, int64_t batch_size,
                      int64_t length) {
  check_unpack(packed, indices, batch_size, length);
  const at::Tensor rows = packed.contiguous();
  const at::Tensor dense_indices = indices.contiguous();
  check_indices("unpack", dense_indices, batch_size * length);
  at::Tensor hidden = at::zeros({batch_size, length, rows.size(1)}, rows.options());
  kernels::unpack_rows({.packed = static_cast<const char*>(rows.const_data_ptr()),
                        .indices = dense_indices.const_data_ptr<int32_t>(),
                        .tokens = rows.size(0),
                        .row_bytes = rows.size(1) * rows.element_size(),
                        .hidden = static_cast<char*>(hidden.mutable_data_ptr())},
                       at_parallel);
  return hidden;
}

at::Tensor unpack_backward_cpu(const at::Tensor& grad, const at::Tensor& indices) {
  check_unpack_backward(grad, indices);
  const at::Tensor dense_indices = indices.contiguous();
  check_indices("_unpack_backward", dense_indices, grad.size(0) * grad.size(1));
  return gather_rows(grad, dense_indices);
}

}  // namespace

Tokens empty_tokens(int64_t batch, int64_t count) {
  const at::TensorOptions int32 = at::TensorOptions().dtype(at::kInt);
  return {at::empty({count}, int32), at::empty({batch + 1}, int32)};
}

Tokens find_tokens(const char* op, const at::Tensor& attention_mask) {
  const at::Tensor mask = attention_mask.contiguous();
  const int64_t batch = mask.size(0), length = mask.size(1);
  std::vector<int32_t> cu_seqlens(batch + 1);
  Tokens found;
  AT_DISPATCH_INTEGRAL_TYPES_AND(at::kBool, mask.scalar_type(), "pack", [&] {
    const auto* entries = static_cast<const kernels::TruthOr<scalar_t>*>(mask.const_data_ptr());
    const int64_t tokens = kernels::count_tokens(entries, batch, length, cu_seqlens.data());
    TORCH_CHECK_VALUE(tokens >= 0, op, ": expected attention_mask to hold only 0 and 1, got ",
                      kernels::shown(entries[tokens < 0 ? -1 - tokens : 0]), " at [",
                      (-1 - tokens) / std::max<int64_t>(length, 1), ", ",
                      (-1 - tokens) % std::max<int64_t>(length, 1), "]");
    found = empty_tokens(batch, tokens);
    kernels::token_indices(entries, batch * length, found.indices.mutable_data_ptr<int32_t>());
  });
  std::copy(cu_seqlens.begin(), cu_seqlens.end(), found.cu_seqlens.mutable_data_ptr<int32_t>());
  return found;
}

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("pack", &pack_cpu);
  m.impl("unpack", &unpack_cpu);
  m.impl("_unpack_backward", &unpack_backward_cpu);
}

}  // namespace dynplan
