#include "ops/cpu/encoder_phases.h"

#include <torch/library.h>

#include <vector>

namespace dynplan {
namespace {

kernels::PhaseTimes times;
std::atomic<bool> recording = false;

// Seconds of thread time in each kernels::Phase since the last call, without those inside it; switches
// recording on or off.
std::vector<double> encoder_phases(bool record) {
  recording = record;
  std::vector<double> seconds;
  for (std::atomic<int64_t>& spent : times.nanoseconds) seconds.push_back(1e-9 * spent.exchange(0));
  const auto of = [&](kernels::Phase phase) -> double& { return seconds[static_cast<int>(phase)]; };
  of(kernels::Phase::attention) -= of(kernels::Phase::scores) + of(kernels::Phase::context);
  return seconds;
}

}  // namespace

kernels::PhaseTimes* encoder_phase_times() {
  return recording ? &times : nullptr;
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def("_encoder_phases(bool record) -> float[]", &encoder_phases);
}

}  // namespace dynplan
