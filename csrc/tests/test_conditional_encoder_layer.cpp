#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kernels/encoder/checks.h"
#include "kernels/encoder/conditional_encoder_layer.h"
#include "tests/check.h"
#include "tests/threads.h"

using namespace dynplan::kernels;

namespace {

using Rows = std::vector<std::vector<double>>;

struct Weights {
  int64_t h, i;
  std::vector<std::vector<float>> tensors;  // in the order of EncoderLayerTensors

  Weights(int64_t h, int64_t i, std::mt19937& random) : h(h), i(i) {
    std::normal_distribution<float> normal;
    const auto draw = [&](int64_t count, double scale) {
      std::vector<float> values(count);
      for (float& value : values) value = normal(random) * static_cast<float>(scale);
      tensors.push_back(std::move(values));
    };
    const double across = 1 / std::sqrt(h), down = 1 / std::sqrt(i);
    draw(3 * h * h, across), draw(3 * h, 1), draw(h * h, across), draw(h, 1), draw(h, 1), draw(h, 1);
    draw(i * h, across), draw(i, 1), draw(h * i, down), draw(h, 1), draw(h, 1), draw(h, 1);
  }

  // As a matrix of bfloat16 holds them.
  void round() {
    for (const int t : {0, 2, 6, 8})
      for (float& value : tensors[t]) value = to_float(to_bfloat16(value));
  }

  std::vector<char> packed(WeightType type) const {
    std::vector<char> blob(PackedLayout(type, h, i).bytes());
    const auto& t = tensors;
    pack_encoder_weights<float>(
        type,
        {t[0].data(), t[1].data(), t[2].data(), t[3].data(), t[4].data(), t[5].data(), t[6].data(),
         t[7].data(), t[8].data(), t[9].data(), t[10].data(), t[11].data()},
        h, i, blob.data());
    return blob;
  }

  std::vector<double> linear(const std::vector<double>& x, int index) const {
    const auto &weight = tensors[index], &bias = tensors[index + 1];
    std::vector<double> out(bias.begin(), bias.end());
    for (size_t n = 0; n < out.size(); ++n)
      for (size_t k = 0; k < x.size(); ++k) out[n] += double(weight[n * x.size() + k]) * x[k];
    return out;
  }

  std::vector<double> normed_sum(const std::vector<double>& a, const std::vector<double>& b, int index,
                                 double eps) const {
    std::vector<double> x(h);
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < h; ++c) mean += (x[c] = a[c] + b[c]) / h;
    for (int64_t c = 0; c < h; ++c) variance += (x[c] - mean) * (x[c] - mean) / h;
    for (int64_t c = 0; c < h; ++c)
      x[c] = (x[c] - mean) / std::sqrt(variance + eps) * tensors[index][c] + tensors[index + 1][c];
    return x;
  }
};

double activate(Activation activation, double x) {
  const auto sigmoid = [](double y) { return 1 / (1 + std::exp(-y)); };
  switch (activation) {
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return x * sigmoid(2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
    case Activation::relu:
      return std::max(x, 0.0);
    case Activation::silu:
      return x * sigmoid(x);
  }
  return 0;
}

// One sequence through one layer, in double.
Rows layer(const Weights& w, const Rows& x, int64_t heads, Activation activation, double eps) {
  const int64_t depth = w.h / heads;
  Rows qkv, out;
  for (const auto& row : x) qkv.push_back(w.linear(row, 0));
  for (size_t a = 0; a < x.size(); ++a) {
    std::vector<double> context(w.h, 0.0);
    for (int64_t head = 0; head < heads; ++head) {
      std::vector<double> share;
      double total = 0;
      for (size_t b = 0; b < x.size(); ++b) {
        double score = 0;
        for (int64_t d = head * depth; d < (head + 1) * depth; ++d) score += qkv[a][d] * qkv[b][w.h + d];
        share.push_back(std::exp(score / std::sqrt(double(depth))));
        total += share.back();
      }
      for (size_t b = 0; b < x.size(); ++b)
        for (int64_t d = head * depth; d < (head + 1) * depth; ++d)
          context[d] += share[b] / total * qkv[b][2 * w.h + d];
    }
    const auto y = w.normed_sum(x[a], w.linear(context, 2), 4, eps);
    auto up = w.linear(y, 6);
    for (double& value : up) value = activate(activation, value);
    out.push_back(w.normed_sum(y, w.linear(up, 8), 10, eps));
  }
  return out;
}

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
    weights.emplace_back(h, c.intermediate, random);
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
