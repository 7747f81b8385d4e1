// Answers on the way: the mean of a sample's rows, linear maps of it, and how sure an answer is.
//
// Each number is summed in one order, whatever is computed beside it: same sample, same bits, in any batch and
// on any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "kernels/encoder/activation.h"
#include "kernels/parallel.h"

namespace dynplan::kernels {

// y = activation(W x + b)
struct LinearMap {
  const float* weight;  // (outputs, inputs), dense
  const float* bias;    // (outputs,)
  int64_t inputs, outputs;
};

// What stands between two linear maps of a model's own head.
enum class HeadActivation { none, tanh, gelu, relu };

inline std::optional<HeadActivation> head_activation_of(std::string_view name) {
  if (name == "none") return HeadActivation::none;
  if (name == "tanh") return HeadActivation::tanh;
  if (name == "gelu") return HeadActivation::gelu;
  if (name == "relu") return HeadActivation::relu;
  return std::nullopt;
}

inline float activate(HeadActivation activation, float x) {
  switch (activation) {
    case HeadActivation::tanh:
      return std::tanh(x);
    case HeadActivation::gelu:
      return 0.5f * x * (1.f + std::erf(x * 0.70710678f));
    case HeadActivation::relu:
      return x < 0.f ? 0.f : x;  // NaN stays NaN
    default:
      return x;
  }
}

// Mean of rows [begin, end) of `hidden` (T, width); zeros of no rows.
inline void mean_of_rows(const float* hidden, int64_t begin, int64_t end, int64_t width, float* mean) {
  std::fill(mean, mean + width, 0.f);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t k = 0; k < width; ++k) mean[k] += hidden[row * width + k];
  const float share = end > begin ? 1.f / static_cast<float>(end - begin) : 0.f;
  for (int64_t k = 0; k < width; ++k) mean[k] *= share;
}

// Four chains of sums, which wait for nothing but memory; sharing a row of weights among four samples as well
// took twice the time.
inline float dot(const float* a, const float* b, int64_t size) {
  constexpr int kLanes = 8, kChains = 4;
  typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  Lanes sums[kChains] = {};
  int64_t k = 0;
  for (; k + kLanes * kChains <= size; k += kLanes * kChains)
    for (int c = 0; c < kChains; ++c)
      sums[c] += *reinterpret_cast<const Lanes*>(a + k + c * kLanes) *
                 *reinterpret_cast<const Lanes*>(b + k + c * kLanes);
  const Lanes all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0.f;
  for (int lane = 0; lane < kLanes; ++lane) sum += all[lane];
  for (; k < size; ++k) sum += a[k] * b[k];
  return sum;
}

// Maps the listed rows of x (B, inputs) to the same rows of y (B, outputs). Threads share the outputs, so that
// a weight is read once.
inline void apply(const LinearMap& map, HeadActivation activation, const std::vector<int64_t>& rows,
                  const float* x, float* y, Parallel parallel) {
  constexpr int64_t kWorthSharing = 1 << 19;  // multiplications: waking a thread takes as long as 1 << 17
  const int64_t work = std::max<int64_t>(1, map.inputs * static_cast<int64_t>(rows.size()));
  parallel(map.outputs, (kWorthSharing + work - 1) / work, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (const int64_t b : rows)
        y[b * map.outputs + o] = activate(
            activation, map.bias[o] + dot(map.weight + o * map.inputs, x + b * map.inputs, map.inputs));
  });
}

// What makes an answer sure (dynplan/policies/exits.py).
enum class Sureness { confidence, entropy, learned, error, patience };

inline std::optional<Sureness> sureness_of(std::string_view name) {
  if (name == "confidence") return Sureness::confidence;
  if (name == "entropy") return Sureness::entropy;
  if (name == "learned") return Sureness::learned;
  if (name == "error") return Sureness::error;
  if (name == "patience") return Sureness::patience;
  return std::nullopt;
}

// The largest probability of an answer at a temperature.
inline float confidence(const float* answer, int64_t classes, float temperature) {
  const float top = *std::max_element(answer, answer + classes);
  float sum = 0.f;
  for (int64_t c = 0; c < classes; ++c) sum += std::exp((answer[c] - top) / temperature);
  return 1.f / sum;
}

// Minus the entropy of an answer's probabilities.
inline float negative_entropy(const float* answer, int64_t classes) {
  const float top = *std::max_element(answer, answer + classes);
  float sum = 0.f, weighted = 0.f;
  for (int64_t c = 0; c < classes; ++c) {
    const float e = std::exp(answer[c] - top);
    sum += e;
    weighted += e * (answer[c] - top);
  }
  return weighted / sum - std::log(sum);
}

// How many exits in a row have given one sample's answer; a number is the same within 0.05.
struct Patience {
  float before = 0.f;
  float count = -1.f;  // nothing asked yet

  float see(const float* answer, int64_t classes) {
    const float now =
        classes == 1 ? answer[0] : static_cast<float>(std::max_element(answer, answer + classes) - answer);
    const bool same = classes == 1 ? std::fabs(now - before) < 0.05f : now == before;
    count = count < 0.f || !same ? 0.f : count + 1.f;
    before = now;
    return count;
  }
};

}  // namespace dynplan::kernels
