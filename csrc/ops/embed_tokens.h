// Contract of dynplan::embed_tokens.
//
//   embed_tokens(input_ids (B, S) int32 or int64, attention_mask? (B, S) bool or integer of 0 and 1,
//       token_type_ids? (B, S) as input_ids, word (V, E), type (K, E), position (P, E), norm_weight (E,),
//       norm_bias (E,), eps, padding_idx?)
//     -> packed (T, E), indices int32 (T,), cu_seqlens int32 (B+1,)
//
// The embeddings of BERT and its like, and pack: packed[t] = LayerNorm(word[id] + type[k] + position[p]).
// indices and cu_seqlens are those of pack; no mask: all are tokens. No token types: row 0. padding_idx: of
// RoBERTa's rule for positions (kernels/encoder/embed_tokens.h); none: the column. All ids are checked,
// padding's too.
//
// CPU, float32, inference. dynplan/ops/embed_tokens.py composes everything else from PyTorch operations.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace dynplan {

// The arguments of one call, checked for shape, type and device; contents are left to the kernel's caller.
struct EmbedTokensCall {
  const char* op;  // the name errors carry
  const at::Tensor& input_ids;
  const std::optional<at::Tensor>&attention_mask, &token_type_ids;
  const at::Tensor &word, &type, &position, &norm_weight, &norm_bias;
  double eps;
  std::optional<int64_t> padding_idx;
};

void check_embed_tokens(const EmbedTokensCall& call);

}  // namespace dynplan
