#include <cmath>

#include "fuzz/guarded.h"
#include "fuzz/parallels.h"
#include "fuzz/targets.h"
#include "kernels/planning/exits.h"
#include "kernels/planning/stream_budget.h"

using namespace dynplan::kernels;

namespace dynplan::fuzz {
namespace {

Guarded<float> drawn(Source& random, int64_t count) {
  Guarded<float> values(random, count);
  for (float& value : values) value = 2 * random.real();
  return values;
}

double activated(HeadActivation activation, double x) {
  switch (activation) {
    case HeadActivation::tanh:
      return std::tanh(x);
    case HeadActivation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case HeadActivation::relu:
      return std::max(x, 0.0);
    default:
      return x;
  }
}

bool close(double a, double b) { return std::abs(a - b) <= 1e-4 * (1 + std::abs(b)); }

// Means of rows, then a linear map of some of them.
void maps(Source& random) {
  const int64_t samples = random.size(0, 6), inputs = random.size(1, 80), outputs = random.size(1, 9);
  std::vector<int64_t> offsets = {0}, chosen;
  for (int64_t b = 0; b < samples; ++b) {
    offsets.push_back(offsets.back() + random.size(0, 5));
    if (!random.one_in(3)) chosen.push_back(b);
  }
  const Guarded<float> hidden = drawn(random, offsets.back() * inputs),
                       weight = drawn(random, inputs * outputs), bias = drawn(random, outputs);
  Guarded<float> mean(random, samples * inputs), y(random, samples * outputs);
  y.fill(-77);
  for (int64_t b = 0; b < samples; ++b)
    mean_of_rows(hidden.data(), offsets[b], offsets[b + 1], inputs, mean.data() + b * inputs);
  const auto activation = static_cast<HeadActivation>(random.between(0, 3));
  on_some_parallel(random, 64, [&](Parallel parallel) {
    apply({weight.data(), bias.data(), inputs, outputs}, activation, chosen, mean.data(), y.data(), parallel);
  });
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t rows = offsets[b + 1] - offsets[b];
    const bool asked = std::count(chosen.begin(), chosen.end(), b) > 0;
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = bias[o];
      for (int64_t k = 0; k < inputs; ++k) {
        double total = 0;
        for (int64_t row = offsets[b]; row < offsets[b + 1]; ++row) total += hidden[row * inputs + k];
        sum += rows == 0 ? 0 : total / rows * weight[o * inputs + k];
      }
      EXPECT(asked ? close(y[b * outputs + o], activated(activation, sum)) : y[b * outputs + o] == -77);
    }
  }
}

void answers(Source& random) {
  const int64_t classes = random.size(1, 12);
  Guarded<float> answer = drawn(random, classes);
  const float temperature = 0.1f + std::abs(random.real());
  double sum = 0, tempered = 0, top = -INFINITY;
  for (const float x : answer) sum += std::exp(double{x}), top = std::max(top, double{x});
  double entropy = 0;
  for (const float x : answer) {
    entropy += std::exp(double{x}) / sum * (x - std::log(sum));
    tempered += std::exp((x - top) / temperature);
  }
  EXPECT(close(confidence(answer.data(), classes, temperature), 1 / tempered));
  EXPECT(close(negative_entropy(answer.data(), classes), entropy));
  Patience patience;
  for (float times = 0; times < 3; ++times) EXPECT(patience.see(answer.data(), classes) == times);
  // Numbers that are none: anything may come out, nothing may be read beyond the end.
  answer[random.between(0, classes - 1)] = random.pick<float>({NAN, INFINITY, -INFINITY});
  confidence(answer.data(), classes, temperature);
  negative_entropy(answer.data(), classes);
  patience.see(answer.data(), classes);
}

// Batch after batch, the contract holds.
void streams(Source& random) {
  const int64_t layers = random.size(0, 12);
  const StreamRates rates = {random.between(0, 16) / 16., static_cast<double>(random.size(0, 8)), layers};
  StreamCounts counts = {};
  for (int64_t batches = random.size(1, 6); batches > 0; --batches) {
    const int64_t samples = random.size(0, 10), steps = random.between(0, layers);
    Guarded<int32_t> offsets(random, samples + 1);
    offsets[0] = 0;
    for (int64_t b = 0; b < samples; ++b) offsets[b + 1] = offsets[b] + static_cast<int32_t>(random.size(0, 9));
    arrive(counts, offsets.data(), samples);
    std::vector<uint8_t> wanted(samples);
    for (uint8_t& one : wanted) one = !random.one_in(3);
    Guarded<float> priority = drawn(random, samples);
    for (float& value : priority)
      if (random.one_in(6)) value = random.pick<float>({NAN, INFINITY, -INFINITY, 0});
    const std::vector<uint8_t> asked = wanted;
    const bool ranked = random.one_in(2);
    const Room before = room(counts, rates);
    admit(ranked ? priority.data() : nullptr, offsets.data(), steps, before, wanted);
    for (int64_t b = 0; b < samples; ++b) EXPECT(wanted[b] <= asked[b]);
    // Nobody is taken who ranks below one that was sent away.
    for (int64_t a = 0; a < samples; ++a)
      for (int64_t b = 0; ranked && b < samples; ++b)
        if (asked[a] && !wanted[a] && wanted[b]) EXPECT(!(priority[a] > priority[b]));
    count(counts, wanted, offsets.data(), steps);
    const double share = rates.share * static_cast<double>(layers), burst = rates.burst * layers;
    EXPECT(counts.sample_layers <= share * counts.samples + burst + 2e-6);
    EXPECT(counts.token_layers <= share * counts.tokens + burst * counts.longest + 2e-6);
    EXPECT(level(counts, rates) <= 1 + share * counts.samples / std::max(burst, 1.) + 2e-6);
  }
}

}  // namespace

void fuzz_planning(Source& random) {
  switch (random.between(0, 2)) {
    case 0:
      return maps(random);
    case 1:
      return answers(random);
    default:
      return streams(random);
  }
}

}  // namespace dynplan::fuzz
