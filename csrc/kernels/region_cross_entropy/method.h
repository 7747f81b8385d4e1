// Which of the loops sums the windows: the choice that forward, backward and both at once share.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/region_cross_entropy/loss_and_gradient.h"
#include "kernels/region_cross_entropy/probabilities.h"
#include "kernels/region_cross_entropy/windows_small.h"

namespace dynplan::kernels::DYNPLAN_ISA {

enum class Method { small, general };

// DYNPLAN_REGION_METHOD forces a method, for measurements: `general` takes everything, `small` what it can
// take.
inline Method method_of(const RegionCrossEntropyParams& p) {
  const char* const variable = std::getenv("DYNPLAN_REGION_METHOD");
  const std::string forced = variable == nullptr ? "" : variable;
  if (forced != "" && forced != "small" && forced != "general")
    throw std::invalid_argument(
        "region_cross_entropy: expected DYNPLAN_REGION_METHOD to be small or general, got " + forced);
  return takes_small_windows(p) && forced != "general" ? Method::small : Method::general;
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
