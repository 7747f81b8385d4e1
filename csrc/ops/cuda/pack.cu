#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "kernels/packing/cuda/pack.cuh"
#include "ops/cuda/launch.h"
#include "ops/pack.h"

namespace dynplan {
namespace {

// out[t] = the row of `hidden` (B, S, H) at flat position indices[t], zeros where that is -1.
void gather_rows(const DeviceScope& device, const at::Tensor& hidden, const at::Tensor& indices,
                 at::Tensor& out) {
  // Only a row must be dense; batches and positions may be strided, expanded or permuted.
  const at::Tensor source = hidden.size(2) <= 1 || hidden.stride(2) == 1 ? hidden : hidden.contiguous();
  const int64_t element = source.element_size();
  C10_CUDA_CHECK(kernels::gather_rows_cuda({.hidden = static_cast<const char*>(source.const_data_ptr()),
                                            .batch_stride = source.stride(0) * element,
                                            .length_stride = source.stride(1) * element,
                                            .row_bytes = source.size(2) * element,
                                            .length = source.size(1),
                                            .indices = indices.const_data_ptr<int32_t>(),
                                            .tokens = indices.numel(),
                                            .packed = static_cast<char*>(out.mutable_data_ptr())},
                                           source.size(0) * source.size(1), device.stream()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pack_cuda(const at::Tensor& hidden,
                                                         const at::Tensor& attention_mask) {
  check_pack(hidden, attention_mask);
  const DeviceScope device("pack", hidden.device());
  const int64_t positions = hidden.size(0) * hidden.size(1);
  const at::Tensor mask = attention_mask.contiguous();
  const auto int32 = mask.options().dtype(at::kInt);
  at::Tensor packed = at::empty({positions, hidden.size(2)}, hidden.options());
  if (positions == 0) return {packed, at::empty({0}, int32), at::zeros({hidden.size(0) + 1}, int32)};
  at::Tensor indices = at::empty({positions}, int32);
  at::Tensor cu_seqlens = at::empty({hidden.size(0) + 1}, int32);
  at::Tensor counts = at::empty({kernels::pack_chunks(positions)}, int32);
  AT_DISPATCH_INTEGRAL_TYPES_AND(at::kBool, mask.scalar_type(), "pack", [&] {
    using Entry = kernels::TruthOr<scalar_t>;
    C10_CUDA_CHECK(
        kernels::token_indices_cuda<Entry>({.mask = static_cast<const Entry*>(mask.const_data_ptr()),
                                            .positions = positions,
                                            .length = hidden.size(1),
                                            .counts = counts.mutable_data_ptr<int32_t>(),
                                            .indices = indices.mutable_data_ptr<int32_t>(),
                                            .cu_seqlens = cu_seqlens.mutable_data_ptr<int32_t>()},
                                           device.stream()));
  });
  gather_rows(device, hidden, indices, packed);
  return {packed, indices, cu_seqlens};
}

at::Tensor unpack_cuda(const at::Tensor& packed, const at::Tensor& indices, int64_t batch_size,
                       int64_t length) {
  check_unpack(packed, indices, batch_size, length);
  const DeviceScope device("unpack", packed.device());
  const int64_t positions = batch_size * length;
  const at::Tensor dense_indices = indices.contiguous();
  at::Tensor hidden = at::empty({batch_size, length, packed.size(1)}, packed.options());
  at::Tensor slots = at::empty({positions}, dense_indices.options());
  C10_CUDA_CHECK(kernels::invert_indices_cuda(dense_indices.const_data_ptr<int32_t>(), dense_indices.numel(),
                                              positions, slots.mutable_data_ptr<int32_t>(), device.stream()));
  gather_rows(device, packed.unsqueeze(0), slots, hidden);
  return hidden;
}

at::Tensor unpack_backward_cuda(const at::Tensor& grad, const at::Tensor& indices) {
  check_unpack_backward(grad, indices);
  const DeviceScope device("_unpack_backward", grad.device());
  at::Tensor out = at::empty({indices.size(0), grad.size(2)}, grad.options());
  gather_rows(device, grad, indices.contiguous(), out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CUDA, m) {
  m.impl("pack", &pack_cuda);
  m.impl("unpack", &unpack_cuda);
  m.impl("_unpack_backward", &unpack_backward_cuda);
}

}  // namespace dynplan
