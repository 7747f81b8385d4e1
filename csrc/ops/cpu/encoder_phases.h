// The one record of encoder phases in this process, written by conditional_encoder while it is switched on.
#pragma once

#include "kernels/encoder/phases.h"

namespace dynplan {

// Where to add times, or null while nobody is profiling.
kernels::PhaseTimes* encoder_phase_times();

}  // namespace dynplan
