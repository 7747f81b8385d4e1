// A Parallel for tests: one std::thread per range, so that data races show under a thread sanitizer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels/parallel.h"

namespace dynplan::test {

inline constexpr auto threads = [](int64_t n, int64_t grain, kernels::RangeBody body) {
  const int64_t step = std::max<int64_t>({1, grain, (n + 2) / 3});
  std::vector<std::thread> pool;
  for (int64_t begin = 0; begin < n; begin += step)
    pool.emplace_back([=] { body(begin, std::min(n, begin + step)); });
  for (std::thread& thread : pool) thread.join();
};

}  // namespace dynplan::test
