#include <cmath>

#include "fuzz/guarded.h"
#include "fuzz/isa.h"
#include "fuzz/parallels.h"
#include "fuzz/targets.h"
#include "kernels/encoder/embed_tokens.h"
#include "kernels/packing/pack.h"

using namespace dynplan::kernels;

namespace dynplan::fuzz {
namespace {

struct DrawnIds {
  bool wide;
  Guarded<int64_t> longs;
  Guarded<int32_t> ints;

  DrawnIds(Source& random, int64_t count, int64_t limit, bool broken)
      : wide(random.one_in(2)), longs(random, wide ? count : 0), ints(random, wide ? 0 : count) {
    for (int64_t& id : longs) id = broken && random.one_in(3) ? random.edge() : random.between(0, limit - 1);
    for (int32_t& id : ints)
      id = static_cast<int32_t>(broken && random.one_in(3) ? random.edge() : random.between(0, limit - 1));
  }
  Ids view() const { return {wide ? static_cast<const void*>(longs.data()) : ints.data(), wide}; }
  int64_t at(int64_t i) const { return wide ? longs[i] : ints[i]; }
  int64_t first_outside(int64_t count, int64_t limit) const {
    for (int64_t i = 0; i < count; ++i)
      if (at(i) < 0 || at(i) >= limit) return i;
    return -1;
  }
};

Guarded<float> drawn(Source& random, int64_t count) {
  Guarded<float> values(random, count);
  for (float& value : values) value = 2 * random.real();
  return values;
}

// RoBERTa's rule, or the column.
int64_t position_of(const DrawnIds& ids, int64_t length, int64_t padding_idx, int64_t at) {
  const int64_t row = at / length * length;
  if (padding_idx < 0) return at - row;
  int64_t place = padding_idx;
  for (int64_t p = row; p <= at && ids.at(at) != padding_idx; ++p) place += ids.at(p) != padding_idx;
  return place;
}

}  // namespace

void fuzz_embed_tokens(Source& random) {
  const int64_t batch = random.size(0, 6), length = random.size(0, 20), width = random.size(1, 70);
  const int64_t words = random.size(1, 12), types = random.size(1, 3);
  const int64_t padding_idx = random.pick<int64_t>({-1, 0, 1, 2});
  const int64_t positions = length + std::max<int64_t>(padding_idx, 0) + 1;
  const DrawnIds ids(random, batch * length, words, random.one_in(5)),
      kinds(random, batch * length, types, random.one_in(8));
  const int64_t outside = ids.first_outside(batch * length, words),
                kind_outside = kinds.first_outside(batch * length, types);
  EXPECT(find_outside(ids.view(), batch * length, words) == outside);
  EXPECT(find_outside(kinds.view(), batch * length, types) == kind_outside);
  if (outside >= 0 || kind_outside >= 0) return;

  Guarded<uint8_t> mask(random, batch * length);
  for (uint8_t& entry : mask) entry = !random.one_in(4);
  Guarded<int32_t> cu_seqlens(random, batch + 1);
  const int64_t tokens = count_tokens(mask.data(), batch, length, cu_seqlens.data());
  Guarded<int32_t> indices(random, tokens);
  Guarded<int64_t> places(random, tokens);
  token_indices(mask.data(), batch * length, indices.data());
  token_positions(ids.view(), length, padding_idx, indices.data(), tokens, places.data());
  for (int64_t t = 0; t < tokens; ++t)
    EXPECT(places[t] == position_of(ids, length, padding_idx, indices[t]) && places[t] < positions);

  const Guarded<float> word = drawn(random, words * width), type = drawn(random, types * width),
                       position = drawn(random, positions * width), weight = drawn(random, width),
                       bias = drawn(random, width);
  const bool typed = random.one_in(2);
  constexpr float kEps = 1e-3f;
  Guarded<float> packed(random, tokens * width), serially(random, tokens * width);
  EmbedTokensParams params = {ids.view(),    typed ? kinds.view() : Ids{}, indices.data(),  places.data(),
                              tokens,        width,                        word.data(),     type.data(),
                              position.data(), weight.data(),              bias.data(),     kEps,
                              packed.fill(NAN).data()};
  const CpuIsa isa = some_isa(random);
  on_some_parallel(random, 64, [&](Parallel parallel) { embed_tokens(params, parallel, isa); });
  params.packed = serially.data();
  embed_tokens(params, serial, isa);
  EXPECT(std::equal(packed.begin(), packed.end(), serially.begin()));
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = indices[t];
    const float *a = word.data() + ids.at(at) * width, *b = type.data() + (typed ? kinds.at(at) : 0) * width,
                *c = position.data() + places[t] * width;
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < width; ++i) mean += (double{a[i]} + b[i] + c[i]) / width;
    for (int64_t i = 0; i < width; ++i)
      variance += std::pow(double{a[i]} + b[i] + c[i] - mean, 2) / width;
    for (int64_t i = 0; i < width; ++i) {
      const double normed = (double{a[i]} + b[i] + c[i] - mean) / std::sqrt(variance + kEps);
      EXPECT(std::abs(packed[t * width + i] - (normed * weight[i] + bias[i])) < 1e-4);
    }
  }
}

}  // namespace dynplan::fuzz
