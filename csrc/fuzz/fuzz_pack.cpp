#include <optional>

#include "fuzz/guarded.h"
#include "fuzz/parallels.h"
#include "fuzz/targets.h"
#include "kernels/packing/pack.h"

using namespace dynplan::kernels;

namespace dynplan::fuzz {
namespace {

// A mask of Element, and the flat position of its first entry that may not stand there.
template <class Element>
struct Mask {
  Guarded<Element> entries;
  std::optional<int64_t> bad;

  Mask(Source& random, int64_t positions, bool broken) : entries(random, positions) {
    const int64_t density = random.between(0, 8);
    for (int64_t p = 0; p < positions; ++p) {
      const bool set = random.between(1, 8) <= density;
      if constexpr (std::is_same_v<Element, Truth>) {
        entries[p].byte = static_cast<uint8_t>(set ? random.between(1, 255) : 0);
      } else {
        entries[p] = static_cast<Element>(set);
        if (broken && random.one_in(4)) entries[p] = static_cast<Element>(random.edge());
        if (!bad && entries[p] != 0 && entries[p] != 1) bad = p;
      }
    }
  }
};

template <class Element>
void round_trip(Source& random) {
  const int64_t batch = random.size(0, 8), length = random.size(0, 24), row_bytes = random.size(0, 200);
  const Mask<Element> mask(random, batch * length, random.one_in(4));
  Guarded<int32_t> cu_seqlens(random, batch + 1);
  const int64_t tokens = count_tokens(mask.entries.data(), batch, length, cu_seqlens.data());
  if (mask.bad) {
    EXPECT(tokens == -1 - *mask.bad);
    return;
  }
  std::vector<int32_t> wanted;
  for (int64_t b = 0; b < batch; ++b) {
    EXPECT(cu_seqlens[b] == static_cast<int32_t>(wanted.size()));
    for (int64_t s = 0; s < length; ++s)
      if (is_set(mask.entries[b * length + s])) wanted.push_back(static_cast<int32_t>(b * length + s));
  }
  EXPECT(tokens == static_cast<int64_t>(wanted.size()) && cu_seqlens[batch] == tokens);
  Guarded<int32_t> indices(random, tokens);
  token_indices(mask.entries.data(), batch * length, indices.data());
  EXPECT(std::equal(indices.begin(), indices.end(), wanted.begin(), wanted.end()));

  // Some rows are to be skipped.
  const bool skips = random.one_in(4);
  for (int32_t& index : indices)
    if (skips && random.one_in(3)) index = -1;
  const int64_t length_stride = row_bytes + random.size(0, 16),
                batch_stride = length * length_stride + random.size(0, 16);
  const bool expanded = random.one_in(6);
  const int64_t span = batch * length == 0 ? 0
                                           : (expanded ? 0 : (batch - 1) * batch_stride) +
                                                 (length - 1) * length_stride + row_bytes;
  Guarded<char> hidden(random, span), packed(random, tokens * row_bytes),
      back(random, batch * length * row_bytes);
  for (char& byte : hidden) byte = static_cast<char>(random());
  const int64_t step = expanded ? 0 : batch_stride;
  on_some_parallel(random, 64, [&](Parallel parallel) {
    pack_rows({hidden.data(), step, length_stride, row_bytes, length, indices.data(), tokens, packed.data()},
              parallel);
    unpack_rows({packed.data(), indices.data(), tokens, row_bytes, back.fill(0).data()}, parallel);
  });
  std::vector<char> expected(batch * length * row_bytes, 0);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t index = indices[t];
    const std::vector<char> zeros(row_bytes, 0);
    const char* row = index < 0 ? zeros.data()
                                : hidden.data() + index / length * step + index % length * length_stride;
    EXPECT(std::equal(row, row + row_bytes, packed.data() + t * row_bytes));
    if (index >= 0) std::copy_n(row, row_bytes, expected.data() + index * row_bytes);
  }
  EXPECT(std::equal(expected.begin(), expected.end(), back.begin()));
}

}  // namespace

void fuzz_pack(Source& random) {
  switch (random.between(0, 4)) {
    case 0:
      return round_trip<Truth>(random);
    case 1:
      return round_trip<uint8_t>(random);
    case 2:
      return round_trip<int16_t>(random);
    case 3:
      return round_trip<int32_t>(random);
    default:
      return round_trip<int64_t>(random);
  }
}

}  // namespace dynplan::fuzz
