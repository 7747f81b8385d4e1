// Embeddings of real tokens, without padding, on the CPU.
//
//   packed[t] = LayerNorm(word[id] + type[k] + position[p])      one pass over each row
//
// t counts the tokens as pack does: indices[t] = b * S + s. The position p of a token is its column s, or, by
// RoBERTa's rule, padding_idx + the number of ids in its row up to and with it that are not padding_idx
// (padding_idx itself where the token is one of those).
//
// Parallel over tokens. A row is summed and normed by one thread in one order: same token, same bits.
#pragma once

#include <cstdint>

#include "kernels/parallel.h"
#include "kernels/simd/isa.h"

namespace dynplan::kernels {

// Dense integers of either width.
struct Ids {
  const void* data = nullptr;
  bool wide = false;  // int64, else int32
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// The first of n ids outside [0, limit), or -1.
inline int64_t find_outside(Ids ids, int64_t n, int64_t limit) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= limit) return i;
  return -1;
}

// Positions of the tokens at `indices` in rows of `length` ids; padding_idx below 0: their columns. (As wide
// as padding_idx, lest one beyond any table look like one inside.)
inline void token_positions(Ids ids, int64_t length, int64_t padding_idx, const int32_t* indices,
                            int64_t tokens, int64_t* positions) {
  int64_t row = -1, next = 0, seen = 0;  // ids in [row * length, next) that are not padding_idx
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = indices[t];
    if (padding_idx < 0) {
      positions[t] = at % length;
      continue;
    }
    if (at / length != row) row = at / length, next = row * length, seen = 0;
    for (; next <= at; ++next) seen += ids[next] != padding_idx;
    positions[t] = padding_idx + (ids[at] != padding_idx ? seen : 0);
  }
}

struct EmbedTokensParams {
  Ids ids;                              // (B * S,), each a row of `word`
  Ids token_types;                      // (B * S,), each a row of `type`; null data: row 0
  const int32_t* indices;               // (T,)
  const int64_t* positions;             // (T,), each a row of `position`
  int64_t tokens;                       // T
  int64_t width;                        // E
  const float *word, *type, *position;  // tables of dense rows
  const float *norm_weight, *norm_bias;
  float eps;
  float* packed;  // (T, E)
};

// Tokens [begin, end) alone.
DYNPLAN_PER_ISA(void embed_rows(const EmbedTokensParams& p, int64_t begin, int64_t end))

inline void embed_rows(const EmbedTokensParams& p, int64_t begin, int64_t end, CpuIsa isa = cpu_isa()) {
  DYNPLAN_ON_ISA(isa, embed_rows(p, begin, end));
}

// Fewer tokens than this are not worth waking a thread for.
constexpr int64_t kEmbedGrain = 64;

inline void embed_tokens(const EmbedTokensParams& p, Parallel parallel, CpuIsa isa = cpu_isa()) {
  parallel(p.tokens, kEmbedGrain, [&](int64_t begin, int64_t end) { embed_rows(p, begin, end, isa); });
}

}  // namespace dynplan::kernels
