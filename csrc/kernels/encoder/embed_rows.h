// embed_tokens.h for one instruction set. Included once per set, after layer.h.
#pragma once

#include "kernels/encoder/embed_tokens.h"
#include "kernels/encoder/layer.h"

namespace dynplan::kernels::DYNPLAN_ISA {

void embed_rows(const EmbedTokensParams& p, int64_t begin, int64_t end) {
  const int64_t whole = p.width / kLanes * kLanes;
  const auto word_row = [&](int64_t t) { return p.word + p.ids[p.indices[t]] * p.width; };
  for (int64_t t = begin; t < end; ++t) {
    // Words lie anywhere in a large table, so nobody but us knows what comes next.
    if (t + 1 < end)
      for (int64_t i = 0; i < p.width; i += kPanel) __builtin_prefetch(word_row(t + 1) + i);
    const float* word = word_row(t);
    const float* type = p.type + (p.token_types.data ? p.token_types[p.indices[t]] : 0) * p.width;
    const float* position = p.position + p.positions[t] * p.width;
    float* out = p.packed + t * p.width;
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, load(word + i) + load(type + i) + load(position + i));
    for (int64_t i = whole; i < p.width; ++i) out[i] = word[i] + type[i] + position[i];
    normalise_row(out, p.width, p.norm_weight, p.norm_bias, p.eps);
  }
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
