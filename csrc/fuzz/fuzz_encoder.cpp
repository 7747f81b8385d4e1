// conditional_encoder and reduced_encoder, with the weights packed for them.
#include <cmath>

#include "fuzz/guarded.h"
#include "fuzz/isa.h"
#include "fuzz/parallels.h"
#include "fuzz/targets.h"
#include "kernels/encoder/checks.h"
#include "kernels/encoder/reduced_encoder.h"
#include "tests/encoder_naive.h"

using namespace dynplan::kernels;

namespace dynplan::fuzz {
namespace {

struct Shape {
  int64_t heads, depth, intermediate, layers, capacity;
  std::vector<int32_t> lengths;  // of the samples

  explicit Shape(Source& random)
      : heads(random.size(1, 4)),
        depth(random.size(1, 12)),
        intermediate(random.size(1, 50)),
        layers(random.size(0, 4)),
        capacity(random.size(0, 3)) {
    const bool crowded = random.one_in(24);  // enough rows for every way to share them
    for (int64_t b = crowded ? random.between(4, 12) : random.size(0, 5); b > 0; --b)
      lengths.push_back(static_cast<int32_t>(crowded ? random.size(0, 60) : random.size(0, 8)));
    if (crowded) heads = 1, depth = random.size(1, 4), intermediate = random.size(1, 8);
    for (const int32_t length : lengths) capacity += length;
  }
  int64_t width() const { return heads * depth; }
  int64_t samples() const { return static_cast<int64_t>(lengths.size()); }
};

// Which samples are active in which layer, as build_dispatch says it; sequences in any order for some inputs.
struct Dispatch {
  Guarded<int32_t> rows, offsets, counts;
  std::vector<std::vector<int64_t>> active;  // of each layer, samples in the order of its sequences
  int64_t most = 0;

  Dispatch(Source& random, const Shape& s)
      : rows(random, s.layers * s.capacity),
        offsets(random, s.layers * (s.samples() + 1)),
        counts(random, s.layers * 2),
        active(s.layers) {
    rows.fill(-1);
    const bool shuffled = random.one_in(4);
    for (int64_t l = 0; l < s.layers; ++l) {
      for (int64_t b = 0; b < s.samples(); ++b)
        if (!random.one_in(3)) active[l].push_back(b);
      if (shuffled) std::shuffle(active[l].begin(), active[l].end(), random);
      int32_t *row = rows.data() + l * s.capacity, *offset = offsets.data() + l * (s.samples() + 1);
      int32_t filled = 0;
      *offset++ = 0;
      for (const int64_t b : active[l]) {
        int32_t first = 0;
        for (int64_t before = 0; before < b; ++before) first += s.lengths[before];
        for (int32_t t = 0; t < s.lengths[b]; ++t) row[filled++] = first + t;
        *offset++ = filled;
      }
      std::fill(offset, offsets.data() + (l + 1) * (s.samples() + 1), filled);
      counts[2 * l] = static_cast<int32_t>(active[l].size()), counts[2 * l + 1] = filled;
      most = std::max<int64_t>(most, filled);
    }
  }
};

Rows expected(const Shape& s, const Dispatch& dispatch, const std::vector<Weights>& weights,
              const std::vector<float>& hidden, Activation activation, float eps) {
  Rows rows(s.capacity);
  for (int64_t t = 0; t < s.capacity; ++t)
    rows[t].assign(hidden.begin() + t * s.width(), hidden.begin() + (t + 1) * s.width());
  for (int64_t l = 0; l < s.layers; ++l)
    for (const int64_t b : dispatch.active[l]) {
      int64_t first = 0;
      for (int64_t before = 0; before < b; ++before) first += s.lengths[before];
      const Rows y = layer(weights[l], Rows(rows.begin() + first, rows.begin() + first + s.lengths[b]),
                           s.heads, activation, eps);
      std::copy(y.begin(), y.end(), rows.begin() + first);
    }
  return rows;
}

bool rounds_rows(WeightType type, CpuIsa isa) {
#if defined(__x86_64__)
  return type == WeightType::bfloat16 && isa == CpuIsa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return static_cast<void>(type), static_cast<void>(isa), false;
#endif
}

}  // namespace

void fuzz_encoder(Source& random) {
  const Shape s(random);
  const Dispatch dispatch(random, s);
  const auto type = static_cast<WeightType>(random.between(0, 2));
  const bool int8 = type == WeightType::int8, bfloat_rows = random.one_in(4);
  const auto activation = static_cast<Activation>(random.between(0, 3));
  constexpr float kEps = 1e-2f;  // what a variance near zero would blow up is not what is looked for

  std::vector<Weights> weights;
  std::vector<Guarded<char>> blobs;
  blobs.reserve(s.layers);
  std::vector<const void*> packed;
  std::vector<std::pair<const void*, int64_t>> sized;
  for (int64_t l = 0; l < s.layers; ++l) {
    weights.emplace_back(s.width(), s.intermediate, [&] { return 2 * random.real(); });
    if (type == WeightType::bfloat16) weights.back().round();
    const int64_t bytes = int8 ? ReducedLayout(s.width(), s.intermediate).bytes
                               : PackedLayout(type, s.width(), s.intermediate).bytes();
    blobs.emplace_back(random, bytes, random.pick<int64_t>({8, 64}));
    if (int8)
      pack_reduced_weights(weights[l].view(), s.width(), s.intermediate, kRowLevels, blobs[l].data());
    else
      pack_encoder_weights(type, weights[l].view(), s.width(), s.intermediate, blobs[l].data());
    packed.push_back(blobs[l].data());
    sized.emplace_back(blobs[l].data(), bytes);
  }
  std::string problem;
  EXPECT(check_all_packed(sized, s.width(), problem) ==
         (s.layers == 0 ? PackedShape{WeightType::float32, 0} : PackedShape{type, s.intermediate}));
  EXPECT(check_dispatch({dispatch.rows.data(), dispatch.offsets.data(), dispatch.counts.data(), s.layers,
                         s.capacity, s.samples()},
                        problem) == dispatch.most);

  std::vector<float> hidden(s.capacity * s.width());
  for (float& value : hidden) value = to_float(to_bfloat16(2 * random.real()));
  const CpuIsa isa = some_isa(random);
  // What the kernel leaves in `out`, of float or BFloat16; `filled`: it makes the rows itself.
  const auto run = [&](auto& out, Parallel parallel, int64_t workers, bool filled) {
    const auto put = [&](int64_t first, int64_t last) {
      for (int64_t i = first * s.width(); i < last * s.width(); ++i) {
        if constexpr (sizeof(out[0]) == 4)
          out[i] = hidden[i];
        else
          out[i] = to_bfloat16(hidden[i]);
      }
    };
    if (!filled) put(0, s.capacity);
    const RangeBody fill = put;
    Guarded<float> workspace(random, int8 ? reduced_workspace_floats(dispatch.most, s.width(), s.intermediate)
                                          : encoder_workspace_floats(dispatch.most, s.width(), s.intermediate));
    workspace.fill(NAN);
    const ConditionalEncoderParams params = {.hidden = out.data(),
                                             .row_type = bfloat_rows ? RowType::bfloat16 : RowType::float32,
                                             .rows = dispatch.rows.data(),
                                             .cu_seqlens = dispatch.offsets.data(),
                                             .counts = dispatch.counts.data(),
                                             .packed = packed.data(),
                                             .layers = s.layers,
                                             .capacity = s.capacity,
                                             .samples = s.samples(),
                                             .hidden_size = s.width(),
                                             .intermediate_size = s.layers == 0 ? 0 : s.intermediate,
                                             .heads = s.heads,
                                             .activation = activation,
                                             .eps = kEps,
                                             .workers = workers,
                                             .workspace = workspace.data(),
                                             .fill = filled ? &fill : nullptr};
    if (int8)
      reduced_encoder(params, plain_product, parallel, isa);
    else
      conditional_encoder(params, parallel, isa);
  };
  const auto twice = [&]<class Row>(Row) {
    Guarded<Row> out(random, s.capacity * s.width()), again(random, s.capacity * s.width());
    run(out, serial, 1, false);
    const bool filled = random.one_in(2);
    if (random.one_in(16))
      run(again, dynplan::test::threads, 3, filled);
    else
      run(again, serial, random.between(1, 3), filled);
    // The same bits, however the work is shared.
    EXPECT(out.size() == 0 || std::memcmp(out.data(), again.data(), out.size() * sizeof(Row)) == 0);
    std::vector<float> values;
    for (const Row value : out) values.push_back(to_float(value));
    return values;
  };
  const std::vector<float> out = bfloat_rows ? twice(BFloat16{}) : twice(0.f);

  std::vector<bool> touched(s.capacity, false);
  for (int64_t l = 0; l < s.layers; ++l)
    for (int64_t r = 0; r < dispatch.counts[2 * l + 1]; ++r) touched[dispatch.rows[l * s.capacity + r]] = true;
  bool finite = true;
  for (int64_t i = 0; i < s.capacity * s.width(); ++i) {
    finite &= std::isfinite(out[i]);
    if (!touched[i / s.width()]) EXPECT(out[i] == hidden[i]);
  }
  EXPECT(finite);
  if (int8 || bfloat_rows || rounds_rows(type, isa)) return;
  const Rows exact = expected(s, dispatch, weights, hidden, activation, kEps);
  double error = 0;
  for (int64_t i = 0; i < s.capacity * s.width(); ++i)
    error = std::max(error, std::abs(out[i] - exact[i / s.width()][i % s.width()]));
  EXPECT(error < 1e-3 * (1 + s.layers));
}

}  // namespace dynplan::fuzz
