#include "kernels/packing/build_dispatch.h"

#include <random>
#include <vector>

#include "tests/check.h"
#include "tests/threads.h"

using namespace dynplan::kernels;

namespace {

void against_a_loop(int64_t samples, int64_t layers, double share, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> cu_seqlens(samples + 1, 0);
  for (int64_t b = 0; b < samples; ++b) cu_seqlens[b + 1] = cu_seqlens[b] + static_cast<int32_t>(random() % 6);
  const int64_t capacity = cu_seqlens[samples] + 3;
  std::vector<Truth> keep(samples * layers);  // of any bytes
  for (Truth& kept : keep)
    kept.byte = std::uniform_real_distribution<>()(random) < share ? 1 + random() % 255 : 0;

  std::vector<int32_t> rows(layers * capacity, -9), offsets(layers * (samples + 1), -9), counts(layers * 2, -9);
  build_dispatch({keep.data(), layers, 1, cu_seqlens.data(), samples, layers, capacity, rows.data(),
                  offsets.data(), counts.data()},
                 dynplan::test::threads);

  for (int64_t l = 0; l < layers; ++l) {
    std::vector<int32_t> want_rows, want_offsets = {0};
    for (int64_t b = 0; b < samples; ++b) {
      if (!is_set(keep[b * layers + l])) continue;
      for (int32_t row = cu_seqlens[b]; row < cu_seqlens[b + 1]; ++row) want_rows.push_back(row);
      want_offsets.push_back(static_cast<int32_t>(want_rows.size()));
    }
    EXPECT(counts[2 * l] == static_cast<int32_t>(want_offsets.size()) - 1);
    EXPECT(counts[2 * l + 1] == static_cast<int32_t>(want_rows.size()));
    const int32_t last = want_offsets.back();
    want_rows.resize(capacity, -1);
    want_offsets.resize(samples + 1, last);
    for (int64_t t = 0; t < capacity; ++t) EXPECT(rows[l * capacity + t] == want_rows[t]);
    for (int64_t b = 0; b <= samples; ++b) EXPECT(offsets[l * (samples + 1) + b] == want_offsets[b]);
  }
}

}  // namespace

int main() {
  unsigned seed = 0;
  for (double share : {0.0, 0.5, 1.0})
    for (int64_t samples : {0, 1, 2, 9})
      for (int64_t layers : {1, 2, 12}) against_a_loop(samples, layers, share, ++seed);
  return dynplan::test::finish("build_dispatch");
}
