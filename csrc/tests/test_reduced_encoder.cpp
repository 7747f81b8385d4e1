#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/encoder/checks.h"
#include "kernels/encoder/reduced_encoder.h"
#include "tests/check.h"
#include "tests/encoder_naive.h"
#include "tests/threads.h"

using namespace dynplan::kernels;

namespace {

// One layer on all rows but those of the second sequence.
struct Case {
  int64_t heads, depth, intermediate;
  std::vector<int32_t> lengths;
  Activation activation = Activation::gelu;
};

void against_full_precision(const Case& c, unsigned seed, double allowed) {
  std::mt19937 random(seed);
  const int64_t h = c.heads * c.depth, samples = static_cast<int64_t>(c.lengths.size());
  std::normal_distribution<float> normal;
  const Weights weights(h, c.intermediate, [&] { return normal(random); });
  std::vector<int32_t> rows, offsets = {0};
  int32_t tokens = 0;
  for (int64_t b = 0; b < samples; tokens += c.lengths[b++]) {
    if (b == 1) continue;
    for (int32_t t = 0; t < c.lengths[b]; ++t) rows.push_back(tokens + t);
    offsets.push_back(static_cast<int32_t>(rows.size()));
  }
  const std::vector<int32_t> counts = {static_cast<int32_t>(offsets.size()) - 1,
                                       static_cast<int32_t>(rows.size())};
  const int64_t active = counts[1];
  rows.resize(tokens, -1), offsets.resize(samples + 1, offsets.back());
  std::vector<float> hidden(tokens * h);
  for (float& value : hidden) value = normal(random);

  std::vector<char> reduced(ReducedLayout(h, c.intermediate).bytes),
      full(PackedLayout(WeightType::float32, h, c.intermediate).bytes());
  pack_reduced_weights(weights.view(), h, c.intermediate, kRowLevels, reduced.data());
  pack_encoder_weights(WeightType::float32, weights.view(), h, c.intermediate, full.data());
  std::string problem;
  const auto blob = [](const std::vector<char>& bytes) {
    return std::pair<const void*, int64_t>(bytes.data(), bytes.size());
  };
  const std::vector<std::pair<const void*, int64_t>> same = {blob(reduced), blob(reduced)},
                                                     mixed = {blob(reduced), blob(full)};
  EXPECT(check_all_packed(same, h, problem) == (PackedShape{WeightType::int8, c.intermediate}));
  EXPECT(!check_all_packed(mixed, h, problem));
  EXPECT(problem.find("of types int8 and float32") != std::string::npos);

  const auto params = [&](std::vector<float>& out, std::vector<float>& workspace, const void* const* blob,
                          int64_t workers) {
    return ConditionalEncoderParams{
        out.data(), RowType::float32, rows.data(), offsets.data(), counts.data(), blob,         1,
        tokens,     samples,          h,           c.intermediate, c.heads,       c.activation, 1e-5f,
        workers,    workspace.data()};
  };
  const void *full_blob = full.data(), *reduced_blob = reduced.data();
  std::vector<float> wanted = hidden, workspace(encoder_workspace_floats(active, h, c.intermediate));
  conditional_encoder(params(wanted, workspace, &full_blob, 1), serial);

  for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512}) {
    if (isa > best_cpu_isa()) continue;
    const auto run = [&](Parallel parallel, int64_t workers) {
      std::vector<float> out = hidden, space(reduced_workspace_floats(active, h, c.intermediate), NAN);
      const auto p = params(out, space, &reduced_blob, workers);
      reduced_encoder(p, plain_product, parallel, isa);
      return out;
    };
    const std::vector<float> out = run(serial, 1);
    EXPECT(out == run(dynplan::test::threads, 3));  // the same bits on any number of threads
    double error = 0;
    for (size_t e = 0; e < out.size(); ++e) error = std::max(error, std::abs(double{out[e]} - wanted[e]));
    EXPECT(error < allowed);
    for (int64_t t = c.lengths[0]; t < c.lengths[0] + c.lengths[1]; ++t)
      for (int64_t d = 0; d < h; ++d) EXPECT(out[t * h + d] == hidden[t * h + d]);
  }
}

void channels() {
  const float weight[4] = {1, -2, 0.5f, 0.004f}, zero[2] = {0, 0}, broken[2] = {1, INFINITY};
  int8_t out[4];
  EXPECT(reduce_channel(weight, 4, 127, out) == 2.f / 127);
  EXPECT(out[0] == 64 && out[1] == -127 && out[2] == 32 && out[3] == 0);  // 63.5 and 31.75, ties to even
  EXPECT(reduce_channel(weight, 4, 64, out) == 2.f / 64 && out[1] == -64);
  EXPECT(reduce_channel(zero, 2, 127, out) == 0 && out[0] == 0);
  EXPECT(std::isnan(reduce_channel(broken, 2, 127, out)));
}

}  // namespace

int main() {
  channels();
  unsigned seed = 0;
  for (const auto activation :
       {Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::silu}) {
    against_full_precision({2, 16, 48, {3, 4, 7}, activation}, ++seed, 0.15);
  }
  against_full_precision({3, 5, 33, {150, 3, 90, 0, 60}}, ++seed, 0.3);  // several blocks, odd widths
  return dynplan::test::finish("reduced_encoder");
}
