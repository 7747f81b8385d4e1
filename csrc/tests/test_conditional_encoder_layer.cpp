#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kernels/encoder/checks.h"
#include "kernels/encoder/conditional_encoder_layer.h"
#include "tests/check.h"
#include "tests/encoder_naive.h"
#include "tests/threads.h"

using namespace dynplan::kernels;

namespace {

bool rounds_rows() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

struct Case {
  std::vector<int32_t> lengths;
  int64_t heads, depth, intermediate, layers;
  Activation activation;
  WeightType type = WeightType::float32;
};

void against_loops(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t h = c.heads * c.depth, samples = static_cast<int64_t>(c.lengths.size());
  std::vector<int32_t> begin(samples + 1, 0);
  for (int64_t b = 0; b < samples; ++b) begin[b + 1] = begin[b] + c.lengths[b];
  const int64_t tokens = begin[samples];
  std::vector<float> hidden(tokens * h);
  std::normal_distribution<float> normal;
  for (float& value : hidden) value = normal(random);

  std::vector<Weights> weights;
  std::vector<std::vector<char>> blobs;
  std::vector<const void*> packed;
  std::vector<int32_t> rows, offsets, counts;
  Rows exact(tokens);
  for (int64_t t = 0; t < tokens; ++t) exact[t].assign(hidden.begin() + t * h, hidden.begin() + (t + 1) * h);
  std::vector<bool> touched(tokens, false);
  int64_t most = 0;
  for (int64_t l = 0; l < c.layers; ++l) {
    weights.emplace_back(h, c.intermediate, [&] { return normal(random); });
    if (c.type == WeightType::bfloat16) weights.back().round();
    blobs.push_back(weights.back().packed(c.type));
    std::vector<int32_t> active, cuts = {0};
    for (int64_t b = 0; b < samples; ++b) {
      if (random() % 3 == 0) continue;
      for (int32_t t = begin[b]; t < begin[b + 1]; ++t) active.push_back(t), touched[t] = true;
      cuts.push_back(static_cast<int32_t>(active.size()));
      const Rows y = layer(weights[l], Rows(exact.begin() + begin[b], exact.begin() + begin[b + 1]), c.heads,
                           c.activation, 1e-5);
      std::copy(y.begin(), y.end(), exact.begin() + begin[b]);
    }
    counts.insert(counts.end(), {static_cast<int32_t>(cuts.size()) - 1, static_cast<int32_t>(active.size())});
    most = std::max(most, static_cast<int64_t>(active.size()));
    active.resize(tokens, -1);
    cuts.resize(samples + 1, cuts.back());
    rows.insert(rows.end(), active.begin(), active.end());
    offsets.insert(offsets.end(), cuts.begin(), cuts.end());
  }
  for (const auto& blob : blobs) packed.push_back(blob.data());

  for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512}) {
    if (isa > best_cpu_isa()) continue;
    const auto run = [&](Parallel parallel, int64_t workers, bool filled = false) {
      std::vector<float> out = filled ? std::vector<float>(hidden.size(), NAN) : hidden;
      std::vector<float> workspace(encoder_workspace_floats(most, h, c.intermediate), NAN);
      const auto copy = [&](int64_t first, int64_t last) {
        std::copy(hidden.begin() + first * h, hidden.begin() + last * h, out.begin() + first * h);
      };
      const RangeBody fill = copy;
      conditional_encoder({out.data(), RowType::float32, rows.data(), offsets.data(), counts.data(),
                           packed.data(), c.layers, tokens, samples, h, c.intermediate, c.heads, c.activation,
                           1e-5f, workers, workspace.data(), nullptr, filled ? &fill : nullptr},
                          parallel, isa);
      return out;
    };
    const std::vector<float> out = run(serial, 1);
    EXPECT(out == run(dynplan::test::threads, 3));  // the same bits on any number of threads
    EXPECT(out == run(serial, 1, true) && out == run(dynplan::test::threads, 3, true));
    double error = 0;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t d = 0; d < h; ++d) {
        error = std::max(error, std::abs(out[t * h + d] - exact[t][d]));
        if (!touched[t]) EXPECT(out[t * h + d] == hidden[t * h + d]);
      }
    // AVX512-BF16 rounds the rows that meet such weights too.
    const bool rounds = c.type == WeightType::bfloat16 && isa == CpuIsa::avx512 && rounds_rows();
    EXPECT(error < (rounds ? 4e-2 : 2e-5) * (1 + c.layers));
  }
}

// A sequence whose rows were those of several, or a part of one, waits for more than itself.
void regrouped_sequences() {
  const std::vector<int32_t> rows = {0, 1, 2, 3, 0, 1, 2, 3}, counts = {2, 4, 2, 4};
  const auto regroups = [&](std::vector<int32_t> offsets) {
    return Flow({rows.data(), offsets.data(), counts.data(), 2, 4, 2}, [](int64_t) { return 4; }).regroups();
  };
  EXPECT(!regroups({0, 1, 4, 0, 1, 4}));
  EXPECT(regroups({0, 1, 4, 0, 2, 4}) && regroups({0, 3, 4, 0, 1, 4}));
}

// Nothing to do but what fills the rows.
void without_layers() {
  constexpr int64_t kTokens = 300, kWidth = 2;
  for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512}) {
    if (isa > best_cpu_isa()) continue;
    for (const int64_t workers : {1, 3}) {
      std::vector<float> out(kTokens * kWidth, NAN);
      const auto ones = [&](int64_t first, int64_t last) {
        std::fill(out.begin() + first * kWidth, out.begin() + last * kWidth, 1.f);
      };
      const RangeBody fill = ones;
      conditional_encoder({out.data(), RowType::float32, nullptr, nullptr, nullptr, nullptr, 0, kTokens, 5,
                           kWidth, 0, 1, Activation::gelu, 1e-5f, workers, nullptr, nullptr, &fill},
                          dynplan::test::threads, isa);
      EXPECT(out == std::vector<float>(kTokens * kWidth, 1.f));
    }
  }
}

void dispatch_problems() {
  const std::vector<int32_t> rows = {0, 2, -1}, offsets = {0, 1, 2}, counts = {2, 2};
  const auto most = [](std::vector<int32_t> r, std::vector<int32_t> o, std::vector<int32_t> c,
                       std::string want) {
    std::string problem;
    const int64_t got = check_dispatch({r.data(), o.data(), c.data(), 1, 3, 2}, problem);
    EXPECT(problem.find(want) != std::string::npos && problem.empty() == want.empty());
    return got;
  };
  EXPECT(most(rows, offsets, counts, "") == 2);
  EXPECT(most({0, 3, -1}, offsets, counts, "rows in [0, 3), got 3 at 1") == -1);
  EXPECT(most({2, 0, -1}, offsets, counts, "") == 2);  // any order will do, once each
  EXPECT(most({0, 0, -1}, offsets, counts, "rows to be distinct, got 0 again at 1") == -1);
  EXPECT(most({2, -1, -1}, offsets, counts, "rows in [0, 3), got -1 at 1") == -1);
  EXPECT(most(rows, {0, 3, 2}, counts, "ascend, got 3 then 2 at 1") == -1);
  EXPECT(most(rows, {1, 1, 2}, counts, "run from 0 to 2, got 1 to 2") == -1);
  EXPECT(most(rows, offsets, {3, 2}, "at most 2 samples and 3 rows, got 3 and 2") == -1);
}

}  // namespace

int main() {
  unsigned seed = 0;
  for (Activation activation :
       {Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::silu}) {
    for (const WeightType type : {WeightType::float32, WeightType::bfloat16}) {
      against_loops({{}, 2, 4, 8, 2, activation, type}, ++seed);
      against_loops({{3, 0, 1, 7}, 2, 16, 48, 3, activation, type}, ++seed);
      against_loops({{9, 30, 1, 44, 12, 17}, 3, 5, 33, 2, activation, type}, ++seed);  // odd widths
    }
  }
  against_loops({{1, 700}, 1, 16, 16, 1, Activation::gelu}, ++seed);  // more keys than one block
  against_loops({std::vector<int32_t>(20, 11), 2, 8, 1100, 1, Activation::gelu}, ++seed);
  for (const WeightType type : {WeightType::float32, WeightType::bfloat16})  // flows on 3 threads
    against_loops({std::vector<int32_t>(45, 12), 2, 8, 24, 4, Activation::silu, type}, ++seed);
  against_loops({{300}, 3, 5, 33, 1, Activation::gelu, WeightType::bfloat16}, ++seed);  // shared by rows
  against_loops({{20}, 2, 16, 48, 6, Activation::gelu}, ++seed);  // rows stay where the last layer left them
  against_loops({{70, 41}, 3, 16, 80, 3, Activation::gelu}, ++seed);  // many tiles by columns
  dispatch_problems();
  regrouped_sequences();
  without_layers();
  return dynplan::test::finish("conditional_encoder_layer");
}
