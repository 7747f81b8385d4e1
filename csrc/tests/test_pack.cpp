#include "kernels/packing/pack.h"

#include <random>
#include <vector>

#include "tests/check.h"
#include "tests/threads.h"

using namespace dynplan::kernels;

namespace {

void round_trip(int64_t batch, int64_t length, int64_t width, double density, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> hidden(batch * length * width);
  for (float& value : hidden) value = static_cast<float>(random());
  std::vector<uint8_t> mask(batch * length);
  for (uint8_t& entry : mask) entry = std::uniform_real_distribution<>()(random) < density;

  std::vector<int32_t> cu_seqlens(batch + 1);
  const int64_t tokens = count_tokens(mask.data(), batch, length, cu_seqlens.data());
  int64_t ones = 0;
  for (int64_t b = 0; b < batch; ++b) {
    EXPECT(cu_seqlens[b] == ones);
    for (int64_t s = 0; s < length; ++s) ones += mask[b * length + s];
  }
  EXPECT(tokens == ones);

  std::vector<int32_t> indices(tokens);
  token_indices(mask.data(), batch * length, indices.data());
  for (int64_t t = 0; t < tokens; ++t) EXPECT(mask[indices[t]] == 1 && (t == 0 || indices[t - 1] < indices[t]));

  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(float));
  std::vector<float> packed(tokens * width, -1.f), back(hidden.size(), 0.f);
  pack_rows({reinterpret_cast<const char*>(hidden.data()), length * row_bytes, row_bytes, row_bytes, length,
             indices.data(), tokens, reinterpret_cast<char*>(packed.data())},
            dynplan::test::threads);
  unpack_rows({reinterpret_cast<const char*>(packed.data()), indices.data(), tokens, row_bytes,
               reinterpret_cast<char*>(back.data())},
              dynplan::test::threads);
  for (int64_t p = 0; p < batch * length; ++p)
    for (int64_t h = 0; h < width; ++h)
      EXPECT(back[p * width + h] == (mask[p] ? hidden[p * width + h] : 0.f));
}

}  // namespace

int main() {
  unsigned seed = 0;
  for (double density : {0.0, 0.4, 1.0})
    for (int64_t batch : {0, 1, 5})
      for (int64_t width : {0, 1, 33}) round_trip(batch, 7, width, density, ++seed);
  round_trip(40, 50, 96, 0.7, ++seed);

  // Bools of any byte.
  const std::vector<Truth> bytes = {{0}, {1}, {255}, {2}};
  std::vector<int32_t> offsets(3), places(3);
  EXPECT(count_tokens(bytes.data(), 2, 2, offsets.data()) == 3);
  token_indices(bytes.data(), 4, places.data());
  EXPECT((offsets == std::vector<int32_t>{0, 1, 3}) && (places == std::vector<int32_t>{1, 2, 3}));

  const std::vector<int64_t> bad = {1, 0, 3, 1};
  std::vector<int32_t> cu_seqlens(3);
  EXPECT(count_tokens(bad.data(), 2, 2, cu_seqlens.data()) == -1 - 2);
  return dynplan::test::finish("pack");
}
