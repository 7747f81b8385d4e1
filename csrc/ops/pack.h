// Checks of dynplan::pack, dynplan::unpack and dynplan::_unpack_backward, shared by every device. Their
// contract is in dynplan/ops/pack.py. _unpack_backward(grad (B, S, H), indices int32 (T,)) gathers rows, (T, H),
// zeros where the index is -1.
#pragma once

#include <ATen/core/Tensor.h>

namespace dynplan {

void check_pack(const at::Tensor& hidden, const at::Tensor& attention_mask);
void check_unpack(const at::Tensor& packed, const at::Tensor& indices, int64_t batch_size, int64_t length);
void check_unpack_backward(const at::Tensor& grad, const at::Tensor& indices);

}  // namespace dynplan
