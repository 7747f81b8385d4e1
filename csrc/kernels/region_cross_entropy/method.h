// Which of the loops sums the windows: the choice that forward, backward and both at once share.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/region_cross_entropy/bands.h"
#include "kernels/region_cross_entropy/loss_and_gradient.h"
#include "kernels/region_cross_entropy/probabilities.h"
#include "kernels/region_cross_entropy/windows_small.h"

namespace dynplan::kernels::DYNPLAN_ISA {

enum class Method { small, rolling, general };

// DYNPLAN_REGION_METHOD forces a method, for measurements: `general` takes everything, the others what they
// can take.
template <class T>
Method method_of(const RegionCrossEntropyParams& p) {
  const bool small = takes_small_windows(p), rolling = takes_bands<T>(p);
  const char* const variable = std::getenv("DYNPLAN_REGION_METHOD");
  const std::string forced = variable == nullptr ? "" : variable;
  if (forced != "" && forced != "small" && forced != "rolling" && forced != "general")
    throw std::invalid_argument(
        "region_cross_entropy: expected DYNPLAN_REGION_METHOD to be small, rolling or general, got " +
        forced);
  if (forced == "rolling" && rolling) return Method::rolling;
  if (forced == "general") return Method::general;
  return small ? Method::small : rolling ? Method::rolling : Method::general;
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
