#include "fuzz/guarded.h"
#include "fuzz/parallels.h"
#include "fuzz/targets.h"
#include "kernels/encoder/checks.h"
#include "kernels/packing/build_dispatch.h"

using namespace dynplan::kernels;

namespace dynplan::fuzz {

void fuzz_build_dispatch(Source& random) {
  const int64_t samples = random.size(0, 12), layers = random.size(0, 14);
  Guarded<int32_t> cu_seqlens(random, samples + 1);
  cu_seqlens[0] = 0;
  for (int64_t b = 0; b < samples; ++b)
    cu_seqlens[b + 1] = cu_seqlens[b] + static_cast<int32_t>(random.size(0, 20));
  const int64_t capacity = cu_seqlens[samples] + random.size(0, 9);
  const bool one_row = random.one_in(8), turned = random.one_in(2);
  const int64_t sample_stride = one_row ? 0 : turned ? 1 : layers + random.size(0, 3),
                layer_stride = turned ? samples + random.size(0, 3) : 1;
  const int64_t span =
      samples * layers == 0 ? 0 : (samples - 1) * sample_stride + (layers - 1) * layer_stride + 1;
  Guarded<Truth> keep(random, span);
  const int64_t density = random.between(0, 8);
  for (Truth& entry : keep)
    entry.byte = static_cast<uint8_t>(random.between(1, 8) <= density ? random.between(1, 255) : 0);

  Guarded<int32_t> rows(random, layers * capacity), offsets(random, layers * (samples + 1)),
      counts(random, layers * 2);
  rows.fill(-9), offsets.fill(-9), counts.fill(-9);
  on_some_parallel(random, 64, [&](Parallel parallel) {
    build_dispatch({keep.data(), sample_stride, layer_stride, cu_seqlens.data(), samples, layers, capacity,
                    rows.data(), offsets.data(), counts.data()},
                   parallel);
  });

  int64_t most = 0;
  for (int64_t l = 0; l < layers; ++l) {
    std::vector<int32_t> want_rows, want_offsets = {0};
    for (int64_t b = 0; b < samples; ++b) {
      if (!is_set(keep[b * sample_stride + l * layer_stride])) continue;
      for (int32_t row = cu_seqlens[b]; row < cu_seqlens[b + 1]; ++row) want_rows.push_back(row);
      want_offsets.push_back(static_cast<int32_t>(want_rows.size()));
    }
    most = std::max<int64_t>(most, want_offsets.back());
    EXPECT(counts[2 * l] == static_cast<int32_t>(want_offsets.size()) - 1);
    EXPECT(counts[2 * l + 1] == want_offsets.back());
    want_rows.resize(capacity, -1);
    want_offsets.resize(samples + 1, counts[2 * l + 1]);
    EXPECT(std::equal(want_rows.begin(), want_rows.end(), rows.data() + l * capacity));
    EXPECT(std::equal(want_offsets.begin(), want_offsets.end(), offsets.data() + l * (samples + 1)));
  }
  // What follows takes it.
  std::string problem;
  EXPECT(check_dispatch({rows.data(), offsets.data(), counts.data(), layers, capacity, samples}, problem) ==
         most);
}

}  // namespace dynplan::fuzz
