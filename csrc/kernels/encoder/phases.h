// Where the time of encoder layers goes, for `dynplan bench --profile`. Off, it costs a comparison with null
// per block of rows.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace dynplan::kernels {

enum class Phase {
  embed,  // this, dispatch and restore are parts of encode_tokens, which does the whole of a forward
  dispatch,
  gather,  // active rows into a block
  qkv,
  attention,  // with its two products, scores and context, in it
  scores,
  context,
  output,  // with the residual
  norm1,
  up,     // with the activation
  down,   // with the residual
  norm2,  // with the scatter of its rows
  restore,
  answers  // of encode_until_sure: exits, the model's own head, who goes on
};
constexpr int kPhases = 14;

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

// Many short stretches of one phase, added up here and told at the end: telling takes as long as some of
// them.
class PhaseStretches {
 public:
  PhaseStretches(PhaseTimes* times, Phase phase) : times_(times), phase_(phase) {}
  ~PhaseStretches() {
    if (times_ != nullptr)
      times_->nanoseconds[static_cast<int>(phase_)].fetch_add(spent_.count(), std::memory_order_relaxed);
  }
  PhaseStretches(const PhaseStretches&) = delete;
  PhaseStretches& operator=(const PhaseStretches&) = delete;

  template <class F>
  void run(F stretch) {
    if (times_ == nullptr) return stretch();
    const auto start = std::chrono::steady_clock::now();
    stretch();
    spent_ += std::chrono::steady_clock::now() - start;
  }

 private:
  PhaseTimes* times_;
  Phase phase_;
  std::chrono::nanoseconds spent_{0};
};

}  // namespace dynplan::kernels
