// Where the time of encoder layers goes, for `dynplan bench --profile`. Off, it costs a comparison with null
// per block of rows.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace dynplan::kernels {

// Embed, dispatch and restore are those of encode_tokens, which does the whole of a forward. Gather is the
// copy of active rows into a block; norm2 is the layer's last norm with the scatter of its rows; up has the
// activation in it, down and output the residual.
enum class Phase { embed, dispatch, gather, qkv, attention, output, norm1, up, down, norm2, restore };
constexpr int kPhases = 11;

// Summed over all threads and layers.
struct PhaseTimes {
  std::atomic<int64_t> nanoseconds[kPhases] = {};
};

// From construction to destruction, once for each of the threads that wait for it.
class PhaseTimer {
 public:
  PhaseTimer(PhaseTimes* times, Phase phase, int64_t threads = 1)
      : times_(times), phase_(phase), threads_(threads) {
    if (times_ != nullptr) start_ = std::chrono::steady_clock::now();
  }
  ~PhaseTimer() {
    if (times_ == nullptr) return;
    const std::chrono::nanoseconds spent = std::chrono::steady_clock::now() - start_;
    times_->nanoseconds[static_cast<int>(phase_)].fetch_add(threads_ * spent.count(),
                                                            std::memory_order_relaxed);
  }
  PhaseTimer(const PhaseTimer&) = delete;
  PhaseTimer& operator=(const PhaseTimer&) = delete;

 private:
  PhaseTimes* times_;
  Phase phase_;
  int64_t threads_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace dynplan::kernels
