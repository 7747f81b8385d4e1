// Where fuzz targets draw their inputs from: a seeded generator (splitmix64), the same on every machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/parallel.h"

namespace dynplan::fuzz {

class Source {
 public:
  using result_type = uint64_t;
  explicit Source(uint64_t seed) : state_(seed) {}

  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return std::numeric_limits<uint64_t>::max(); }
  uint64_t operator()() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // In [least, most].
  int64_t between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>((*this)() % static_cast<uint64_t>(most - least + 1));
  }
  bool one_in(int64_t times) { return between(1, times) == 1; }
  // In [least, most], small numbers more often.
  int64_t size(int64_t least, int64_t most) { return between(least, between(least, between(least, most))); }
  // In [-1, 1), a multiple of 2^-23.
  float real() { return static_cast<float>(static_cast<int64_t>((*this)() >> 40) - (1 << 23)) * 0x1p-23f; }
  // A number at which integers go wrong.
  int64_t edge() {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    return pick<int64_t>({0, -1, 1, 1 << 16, std::numeric_limits<int32_t>::max(),
                          std::numeric_limits<int32_t>::min(), kMost, -kMost - 1,
                          static_cast<int64_t>((*this)())});
  }

  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }

 private:
  uint64_t state_;
};

// A Parallel on the calling thread: ranges of random lengths, in any order.
class Shuffled {
 public:
  explicit Shuffled(Source& random) : random_(random) {}

  void operator()(int64_t n, int64_t grain, kernels::RangeBody body) {
    std::vector<std::pair<int64_t, int64_t>> ranges;
    for (int64_t begin = 0; begin < n; begin = ranges.back().second) {
      const int64_t end = begin + std::min(n - begin, std::max(grain, random_.between(1, n - begin)));
      ranges.emplace_back(begin, n - end < grain ? n : end);
    }
    std::shuffle(ranges.begin(), ranges.end(), random_);
    for (const auto& [begin, end] : ranges) body(begin, end);
  }

 private:
  Source& random_;
};

}  // namespace dynplan::fuzz
