// Contract of dynplan::pack, dynplan::unpack and dynplan::_unpack_backward.
//
//   pack(hidden (B, S, H) any dtype, attention_mask (B, S) bool or integer of 0 and 1)
//     -> packed (T, H), indices int32 (T,) flat positions b*S+s ascending, cu_seqlens int32 (B+1,)
//   unpack(packed (T, H), indices int32 (T,), batch_size B, length S) -> hidden (B, S, H), zeros at padding
//   _unpack_backward(grad (B, S, H), indices int32 (T,)) -> (T, H), zeros where the index is -1
//
// CPU: T is the number of ones. CUDA: T = B*S whatever the mask, so that no size is read back to the host; the
// count is cu_seqlens[B], indices beyond it are -1 and rows beyond it zero.
#pragma once

#include <ATen/core/Tensor.h>

namespace dynplan {

void check_pack(const at::Tensor& hidden, const at::Tensor& attention_mask);
void check_unpack(const at::Tensor& packed, const at::Tensor& indices, int64_t batch_size, int64_t length);
void check_unpack_backward(const at::Tensor& grad, const at::Tensor& indices);

}  // namespace dynplan
