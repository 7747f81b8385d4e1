// A token bucket over the stream of batches, and who of a batch is taken out of it.
//
//   sample-layers run <= share * L * samples so far + burst * L
//   token-layers run  <= share * L * tokens so far  + burst * L * longest sample so far
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace dynplan::kernels {

// In the order of dynplan.StreamBudget's state.
struct StreamCounts {
  int64_t samples, tokens, sample_layers, token_layers, longest;
};

struct StreamRates {
  double share, burst;
  int64_t layers;  // L
};

// Sample-layers and token-layers that may be run.
struct Room {
  double samples, tokens;
};

// Samples without tokens do not count.
inline void arrive(StreamCounts& counts, const int32_t* cu_seqlens, int64_t samples) {
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t length = cu_seqlens[b + 1] - cu_seqlens[b];
    counts.samples += length > 0;
    counts.tokens += length;
    counts.longest = std::max(counts.longest, length);
  }
}

inline Room room(const StreamCounts& counts, const StreamRates& rates) {
  const double layers = static_cast<double>(rates.layers);
  const double share = rates.share * layers, burst = rates.burst * layers;
  // The small term undoes rounding: 29 of 100 layers at a share of 0.29.
  return {share * counts.samples + burst + 1e-6 - counts.sample_layers,
          share * counts.tokens + burst * counts.longest + 1e-6 - counts.token_layers};
}

// How full the bucket is: 1 at the start; 0 where it holds nothing at all.
inline double level(const StreamCounts& counts, const StreamRates& rates) {
  const double most = rates.burst * static_cast<double>(rates.layers);
  return most > 0 ? room(counts, rates).samples / most : 0.;
}

// Takes candidates in order of falling priority, `steps` layers each, until either room would be passed: clears
// `wanted` of all others. NaN comes last; ties go to the lower index.
inline void admit(const float* priority, const int32_t* cu_seqlens, int64_t steps, const Room& room,
                  std::vector<uint8_t>& wanted) {
  std::vector<int64_t> order(wanted.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  if (priority != nullptr) {
    const auto rank = [&](int64_t b) { return std::isnan(priority[b]) ? -INFINITY : priority[b]; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rank(a) > rank(b); });
  }
  int64_t samples = 0, tokens = 0;
  for (const int64_t b : order) {
    if (wanted[b] == 0) continue;
    samples += steps;
    tokens += steps * (cu_seqlens[b + 1] - cu_seqlens[b]);
    wanted[b] = static_cast<double>(samples) <= room.samples && static_cast<double>(tokens) <= room.tokens;
  }
}

// What `taken` samples cost, `steps` layers each.
inline void count(StreamCounts& counts, const std::vector<uint8_t>& taken, const int32_t* cu_seqlens,
                  int64_t steps) {
  for (size_t b = 0; b < taken.size(); ++b) {
    counts.sample_layers += steps * taken[b];
    counts.token_layers += steps * taken[b] * (cu_seqlens[b + 1] - cu_seqlens[b]);
  }
}

}  // namespace dynplan::kernels
