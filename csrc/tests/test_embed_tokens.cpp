#include <cmath>
#include <random>
#include <vector>

#include "kernels/encoder/embed_tokens.h"
#include "kernels/packing/pack.h"
#include "tests/check.h"
#include "tests/threads.h"

using namespace dynplan::kernels;

namespace {

// Against plain loops in double, one token at a time.
void against_loops(int64_t batch, int64_t length, int64_t width, int64_t padding_idx, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  constexpr int64_t kWords = 11, kTypes = 2;
  const auto table = [&](int64_t rows) {
    std::vector<float> values(rows * width);
    for (float& value : values) value = normal(random);
    return values;
  };
  const std::vector<float> word = table(kWords), type = table(kTypes), position = table(length + 3),
                           weight = table(1), bias = table(1);
  std::vector<int64_t> ids(batch * length);
  std::vector<int32_t> types(batch * length);
  std::vector<uint8_t> mask(batch * length);
  for (int64_t p = 0; p < batch * length; ++p)
    ids[p] = random() % kWords, types[p] = random() % kTypes, mask[p] = random() % 4 != 0;

  std::vector<int32_t> cu_seqlens(batch + 1);
  const int64_t tokens = count_tokens(mask.data(), batch, length, cu_seqlens.data());
  std::vector<int32_t> indices(tokens);
  std::vector<int64_t> positions(tokens);
  token_indices(mask.data(), batch * length, indices.data());
  token_positions({ids.data(), true}, length, padding_idx, indices.data(), tokens, positions.data());

  constexpr float kEps = 1e-5f;
  for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512}) {
    if (isa > best_cpu_isa()) continue;
    for (const bool typed : {false, true}) {
      std::vector<float> packed(tokens * width, NAN), serially = packed;
      EmbedTokensParams params = {{ids.data(), true},
                                  {typed ? types.data() : nullptr, false},
                                  indices.data(),
                                  positions.data(),
                                  tokens,
                                  width,
                                  word.data(),
                                  type.data(),
                                  position.data(),
                                  weight.data(),
                                  bias.data(),
                                  kEps,
                                  packed.data()};
      embed_tokens(params, dynplan::test::threads, isa);
      params.packed = serially.data();
      embed_tokens(params, serial, isa);
      EXPECT(packed == serially);
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = indices[t], row = at / length * length;
        int64_t place = at - row;
        if (padding_idx >= 0) {
          place = padding_idx;
          if (ids[at] != padding_idx)
            for (int64_t p = row; p <= at; ++p) place += ids[p] != padding_idx;
        }
        std::vector<double> x(width);
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < width; ++i) {
          x[i] = double{word[ids[at] * width + i]} + type[(typed ? types[at] : 0) * width + i] +
                 position[place * width + i];
          mean += x[i] / width;
        }
        for (const double value : x) variance += (value - mean) * (value - mean) / width;
        for (int64_t i = 0; i < width; ++i) {
          const double wanted = (x[i] - mean) / std::sqrt(variance + kEps) * weight[i] + bias[i];
          EXPECT(std::abs(packed[t * width + i] - wanted) < 1e-5 * (1 + std::abs(wanted)));
        }
      }
    }
  }
}

}  // namespace

int main() {
  unsigned seed = 0;
  for (int64_t padding_idx : {-1, 0, 2})
    for (int64_t width : {2, 16, 37, 64}) against_loops(5, 9, width, padding_idx, ++seed);
  against_loops(0, 4, 8, -1, ++seed);
  against_loops(40, 30, 48, 1, ++seed);  // enough tokens for several threads

  // Positions beyond 2^31 stay what they are.
  const int64_t id = 3, far = (int64_t{1} << 32) - 5;
  const int32_t first = 0;
  int64_t place = 0;
  token_positions({&id, true}, 1, far, &first, 1, &place);
  EXPECT(place == far + 1);

  const std::vector<int32_t> narrow = {0, 4, -1};
  EXPECT(find_outside({narrow.data(), false}, 2, 5) == -1);
  EXPECT(find_outside({narrow.data(), false}, 3, 5) == 2);
  EXPECT(find_outside({narrow.data(), false}, 3, 4) == 1);
  return dynplan::test::finish("embed_tokens");
}
