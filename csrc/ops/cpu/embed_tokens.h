// Embeddings on the CPU up to the kernel: what embed_tokens and encode_tokens have in common.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/encoder/embed_tokens.h"
#include "ops/cpu/pack.h"
#include "ops/embed_tokens.h"

namespace dynplan {

// The tokens of a batch, their ids and positions checked, ready to be embedded.
struct TokenRows {
  Tokens tokens;
  std::vector<int64_t> positions;     // (T,)
  std::vector<at::Tensor> dense;      // what the pointers below point into
  kernels::EmbedTokensParams params;  // `packed` is left to the caller
};

// Of a call that check_embed_tokens has passed.
TokenRows find_token_rows(const EmbedTokensCall& call);

}  // namespace dynplan
