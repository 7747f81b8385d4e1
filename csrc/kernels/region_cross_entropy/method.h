// Which of the loops sums the windows: the choice that forward, backward and both at once share.
#pragma once

#include <type_traits>

#include "kernels/region_cross_entropy/bands.h"
#include "kernels/region_cross_entropy/loss_and_gradient.h"
#include "kernels/region_cross_entropy/probabilities.h"

namespace dynplan::kernels::DYNPLAN_ISA {

enum class Method { probs, pairs, bands, taps, pool };

// Pairs: with fewer classes too many pixels agree, and vectors of classes are not full; with more so few do
// that whole vectors of pixels cost less.
inline constexpr int64_t kFewestPaired = 5, kMostPaired = 64;
// Classes times taps of what taps do for less than pairs.
inline constexpr int64_t kMostTerms = 1000;

// Whether labels change from pixel to pixel, going by some rows.
template <class T>
bool scattered(const RegionCrossEntropyParams& p) {
  constexpr int64_t kApart = 32;
  using Int = typename Simd<T>::Int;
  LabelRows<T> rows(p);
  Scratch<Int> memory;
  Int* const row = memory.get(p.size[2]);
  int64_t changes = 0, pixels = 0;
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t d = smaller(kApart, p.size[0]) / 2; d < p.size[0]; d += kApart) {
      rows.load(n, d, 0, 0, p.size[2], row);
      for (int64_t x = 1; x < p.size[2]; ++x) changes += row[x] != row[x - 1];
      pixels += p.size[2];
    }
  return 4 * changes > pixels;
}

// Labels are looked at only where something depends on them. Scattered ones go pair by pair, or by taps, the
// cost of which does not depend on where labels end.
template <class T>
Method method_of(const RegionCrossEntropyParams& p) {
  if (p.merge == RegionMerge::probs) return Method::probs;
  const int64_t terms = (2 * p.radius[0] + 1) * (2 * p.radius[2] + 1) * p.classes;
  const bool taps = takes_taps(p), bands = takes_bands<T>(p);
  const bool pairs = takes_pairs<T>(p) && p.classes >= kFewestPaired && p.classes <= kMostPaired &&
                     !(taps && terms <= kMostTerms);
  const bool scattered_by_taps = taps && bands && p.classes <= kMostPaired;
  if ((pairs || scattered_by_taps) && scattered<T>(p)) return pairs ? Method::pairs : Method::taps;
  return bands ? Method::bands : taps ? Method::taps : Method::pool;
}

// f(std::type_identity<Windows>()) of the method's class of windows; probabilities and bands have their own.
template <class T, class F>
auto with_windows(Method method, F f) {
  if (method == Method::pairs) return f(std::type_identity<Pairs<T>>());
  if (method == Method::taps) return f(std::type_identity<Taps<T>>());
  return f(std::type_identity<Pool<T>>());
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
