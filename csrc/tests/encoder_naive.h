// Encoder layers by plain loops in double, and weights for them: the oracle of the kernel tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/encoder/conditional_encoder_layer.h"

namespace dynplan::kernels {

using Rows = std::vector<std::vector<double>>;

struct Weights {
  int64_t h, i;
  std::vector<std::vector<float>> tensors;  // in the order of EncoderLayerTensors

  // number(): of about the normal distribution.
  template <class Number>
  Weights(int64_t h, int64_t i, Number number) : h(h), i(i) {
    const auto draw = [&](int64_t count, double scale) {
      std::vector<float> values(count);
      for (float& value : values) value = number() * static_cast<float>(scale);
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

  EncoderLayerTensors<float> view() const {
    const auto& t = tensors;
    return {t[0].data(), t[1].data(), t[2].data(), t[3].data(), t[4].data(),  t[5].data(),
            t[6].data(), t[7].data(), t[8].data(), t[9].data(), t[10].data(), t[11].data()};
  }

  std::vector<char> packed(WeightType type) const {
    std::vector<char> blob(PackedLayout(type, h, i).bytes());
    pack_encoder_weights(type, view(), h, i, blob.data());
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

inline double activate(Activation activation, double x) {
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
inline Rows layer(const Weights& w, const Rows& x, int64_t heads, Activation activation, double eps) {
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

}  // namespace dynplan::kernels
