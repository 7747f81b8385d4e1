// Contract of dynplan::encode_tokens.
//
//   encode_tokens(input_ids, attention_mask?, token_type_ids?, word, type, position, norm_weight, norm_bias,
//       norm_eps, padding_idx?: as embed_tokens,
//       keep? bool (B, L), packed_weights[L], num_heads, activation, eps: as build_dispatch and
//       conditional_encoder,
//       reads_first)
//     -> (B, S, H) float32, zeros at padding
//
// A whole planned forward: embed_tokens, build_dispatch, conditional_encoder and unpack, with their bits, and
// nothing between them that a short text would wait for. No keep: every layer for every sample. reads_first:
// raises unless position 0 is a token in every sample that has one.
//
// CPU, float32 tables, inference.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "kernels/encoder/activation.h"
#include "ops/embed_tokens.h"

namespace dynplan {

// The arguments of one call, checked for shape, type and device; contents are left to the kernel's caller.
struct EncodeTokensCall {
  EmbedTokensCall embed;
  const std::optional<at::Tensor>& keep;
  at::TensorList packed_weights;
  int64_t num_heads;
  kernels::Activation activation;
  float eps;
  bool reads_first;
};

EncodeTokensCall check_encode_tokens(EmbedTokensCall embed, const std::optional<at::Tensor>& keep,
                                     at::TensorList packed_weights, int64_t num_heads,
                                     std::string_view activation, double eps, bool reads_first);

}  // namespace dynplan
