// Loss and gradient of merge = logits in one pass over the logits. A slope s_q = (l_q / L)^(p-1) / M is known
// but for the factor L^(1-p) / M that all share, so the gradient is made up to that factor, while the merged
// vectors and their exponentials are at hand, and multiplied by it when L is known.
#pragma once

#include "kernels/region_cross_entropy/gradient.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Stride 1, no label smoothing.
template <class T>
class OnceAnchors : public LossAnchors<T> {
  using LossAnchors<T>::p_, LossAnchors<T>::out_;

 public:
  static constexpr bool kGradient = true;

  OnceAnchors(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
              const RegionCrossEntropyGrad&)
      : LossAnchors<T>(params, state), exponent_(static_cast<T>(params.p - 1)) {}

  template <class S>
  DYNPLAN_INLINE void tile(const MergedTile<S>& merged, const AnchorTile<S>& at) {
    using V = typename S::V;
    using M = typename S::M;
    const TileLabels<S> labels(at.own, at.count);
    const MergedLosses<S> made(
        merged, labels, p_.classes, at, [&](int64_t i, int64_t c, V term) __attribute__((always_inline)) {
          at.prefetch(i, c);
          S::store(at.out[i] + c * at.class_stride, term);
        });
    V mass[kRegionStrip];
    for (int64_t i = 0; i < at.count; ++i) {
      const M valid = at.own[i] >= 0;
      V loss = made.loss[i], share = at.scale[i];
      if (out_.weights().weight) {
        const V weight = out_.weights().template of<S>(at.own[i]);
        loss *= weight;
        share *= weight;
      }
      loss = S::masked(valid, loss);
      S::store(at.losses[i], loss);
      S::store(at.lse[i], S::masked(valid, made.log_mass[i]));
      mass[i] = S::masked(valid, share * S::pow(loss, exponent_) / made.mass[i]);
    }
    for (int64_t i = 0; i < at.count; ++i) {
      V own = -made.others[i];
      if (at.share[i]) {
        S::store(at.share[i], mass[i]);
      } else {
        own *= mass[i];
        for (int64_t c = 0; c < p_.classes; ++c) {
          T* out = at.out[i] + c * at.class_stride;
          S::store(out, mass[i] * S::load(out));
        }
      }
      labels.for_each(
          at.own[i],
          [&](int64_t c) __attribute__((always_inline)) {
            T* out = at.out[i] + c * at.class_stride;
            S::store(out, at.own[i] == static_cast<typename S::Int>(c) ? own : S::load(out));
          },
          [&](int lane, int64_t c)
              __attribute__((always_inline)) { at.out[i][c * at.class_stride + lane] = own[lane]; });
    }
  }

 private:
  const T exponent_;
};

// What the gradient has yet to be multiplied by; 0 where powers of the losses left what T can hold.
inline double once_factor(const RegionCrossEntropyParams& p, const PowerSum& total) {
  if (p.reduction == RegionReduction::sum) return 1;
  const double value = total.value(p), exponent = p.p - 1;
  const bool held = std::pow(total.largest, exponent) < 1e25 && std::pow(value, exponent) > 1e-20;
  return held && total.normalizer > 0 ? std::pow(value, -exponent) / total.normalizer : 0;
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
