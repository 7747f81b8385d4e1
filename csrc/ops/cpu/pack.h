// Where the tokens are: what pack and embed_tokens have in common.
#pragma once

#include <ATen/core/Tensor.h>

namespace dynplan {

struct Tokens {
  at::Tensor indices;     // int32 (T,), flat positions b*S+s, ascending
  at::Tensor cu_seqlens;  // int32 (B + 1,)
};

Tokens empty_tokens(int64_t batch, int64_t count);

// Of a mask (B, S), bool or integer. Raises where it holds other than 0 and 1; `op` is the name errors carry.
Tokens find_tokens(const char* op, const at::Tensor& attention_mask);

}  // namespace dynplan
