// merge = probs. With t_pc = softmax(x_p)[c], and u_qc what class c counts in the loss of anchor q:
//
//   v_qc = sum a_qp t_pc,  l_q = -sum_c u_qc log v_qc
//   h_pc = sum_q w(p,q) [y_p = y_q] s_q u_qc / (Z_q v_qc)
//   d value / d x_p[c] = t_pc (sum_j t_pj h_pj - h_pc)
//
// The march, the windows and the sums are those of logits; here is what differs: the values that are pooled,
// the two second stages, and what is made of gathered h. Without label smoothing u_qc is 0 but for the
// label's class, which all pixels that agree with an anchor share: one number per pixel is pooled, the
// probability of its own label. With it every class is.
//
// Planes of logits become planes of probabilities as they are loaded, by the backward once more: exp(x - lse)
// from the forward's logsumexp would lose the digits that x and lse have in common. Probabilities are floored
// at the smallest normal number, merged ones too (by count they may be less than any of theirs): a window of
// hopeless pixels stays finite, and its gradient is that of cross-entropy.
#pragma once

#include "kernels/region_cross_entropy/gradient.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// h is handed on divided by this and t multiplied by it, so that neither leaves the range of T, whatever the
// upstream gradient (a loss scale of 2^16, say): 1 / v reaches 2^126 in float.
template <class T>
inline constexpr T kProbabilityScale = T(0x1p40);

template <class T>
class ProbabilityPlanes : public LogitPlanes<T> {  // whose logits are turned into t
  using Base = LogitPlanes<T>;

 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using typename Base::Int;
  static constexpr bool kReadAgain = true;

  ProbabilityPlanes(const RegionCrossEntropyParams& params, bool /*all_finite*/)
      : Base(params), p_(params), smoothed_(params.label_smoothing > 0) {}

  int64_t channels() const { return smoothed_ ? p_.classes : 1; }
  const Ring<T>& values() const { return smoothed_ ? Base::values() : own_; }

  void reset(const Box& box, int halo, int64_t label_planes, int64_t value_planes) {
    Base::reset(box, halo, label_planes, value_planes);
    if (!smoothed_) own_.reset(own_memory_, Base::values().box, 1, value_planes);
    row_.reset(row_memory_, box.row(), p_.classes, 1);
    lse_ = nullptr;
  }
  // Logsumexps of the pixels of `box` will go to the map `lse` (N, D, H, W).
  void write_lse(const Box& box, T* lse) {
    written_ = box;
    lse_ = lse;
  }

  void load(int64_t n, int64_t d) {
    Base::load(n, d);
    if (d < 0 || d >= p_.size[0]) return;
    Base::for_rows([&](int64_t h, int64_t begin, int64_t end) {
      const int64_t row = ((n * p_.size[0] + d) * p_.size[1] + h) * p_.size[2];
      for (int64_t w = begin; w < end; w += S::lanes) {
        const V logsumexp = to_softmax(d, h, w);
        for (int lane = 0; lse_ && written_.holds(d, h) && lane < S::lanes; ++lane)
          if (w + lane >= written_.begin[2] && w + lane < written_.end[2])
            lse_[row + w + lane] = logsumexp[lane];
      }
    });
  }

  // Calls store(d, h, row, class_stride) with the gradient of row (d, h) of the box, of which h is gathered.
  template <class Store>
  void gradient(int64_t d, int64_t h, const Box& box, const T* gathered, int64_t class_stride, Store store) {
    for (int64_t x = 0; x < box.extent(2); x += S::lanes)
      if (smoothed_)
        smoothed_gradient(d, h, box.begin[2] + x, gathered + x, class_stride, row_.data + x);
      else
        own_gradient(d, h, box.begin[2] + x, gathered + x, row_.data + x);
    store(d, h, row_.data, row_.class_stride);
  }

 private:
  // A vector of pixels, in place; returns their logsumexp.
  V to_softmax(int64_t d, int64_t h, int64_t w) {
    const int64_t classes = p_.classes, stride = Base::values().class_stride;
    T* at = Base::values().at(d, h, w);
    V top = S::fill(-std::numeric_limits<T>::infinity()), sum{}, label_t{};
    for (int64_t c = 0; c < classes; ++c) top = S::max(S::load(at + c * stride), top);
    for (int64_t c = 0; c < classes; ++c) {
      const V term = S::exp(S::load(at + c * stride) - top);
      S::store(at + c * stride, term);
      sum += term;
    }
    const M label = S::load(Base::labels().at(d, h, w));
    const V scale = 1 / sum;
    for (int64_t c = 0; c < classes; ++c) {
      const V t = S::at_least(S::load(at + c * stride) * scale, std::numeric_limits<T>::min());
      S::store(at + c * stride, t);
      label_t = label == static_cast<Int>(c) ? t : label_t;
    }
    if (!smoothed_) S::store(own_.at(d, h, w), label_t);
    return top + S::log(sum);
  }

  // Of a vector of pixels from (d, h, w) on, whose h_p of the label's class is gathered: the other classes'
  // are 0.
  DYNPLAN_INLINE void own_gradient(int64_t d, int64_t h, int64_t w, const T* gathered, T* out) const {
    const Ring<T>& t = Base::values();
    const M own = S::load(Base::labels().at(d, h, w));
    const V r = S::load(gathered) * (S::load(own_.at(d, h, w)) * kProbabilityScale<T>);
    const T* from = t.at(d, h, w);
    for (int64_t c = 0; c < p_.classes; ++c) {
      const V one = S::masked(own == static_cast<Int>(c), S::fill(1));
      const V g = r * (S::load(from + c * t.class_stride) - one);
      S::store(out + c * row_.class_stride, S::masked(own >= 0, g));
    }
  }

  DYNPLAN_INLINE void smoothed_gradient(int64_t d, int64_t h, int64_t w, const T* gathered,
                                        int64_t class_stride, T* out) const {
    const Ring<T>& t = Base::values();
    const M valid = S::load(Base::labels().at(d, h, w)) >= 0;
    const T* from = t.at(d, h, w);
    V sum{};
    for (int64_t c = 0; c < p_.classes; ++c) {
      const V probability = S::load(from + c * t.class_stride);
      const V product = probability * kProbabilityScale<T> * S::load(gathered + c * class_stride);
      S::store(out + c * row_.class_stride, product);
      sum += product;
    }
    for (int64_t c = 0; c < p_.classes; ++c) {
      T* at = out + c * row_.class_stride;
      S::store(at, S::masked(valid, S::load(from + c * t.class_stride) * sum - S::load(at)));
    }
  }

  const RegionCrossEntropyParams& p_;
  const bool smoothed_;
  Box written_{};
  T* lse_ = nullptr;
  Ring<T> own_, row_;  // t of the pixel's own label, not when smoothed; a row of gradient
  Scratch<T> own_memory_, row_memory_;
};

// What -log v_qc counts in the loss of anchors labelled `own`, for the c-th of the channels that are pooled.
template <class T>
DYNPLAN_INLINE typename Simd<T>::V target_share(const ClassWeights<T>& weights, int64_t c,
                                                typename Simd<T>::M own) {
  using S = Simd<T>;
  if (weights.soft == 0) return weights.weight ? weights.template of<S>(own) : S::fill(1);
  const T weight = weights.at(c);
  return S::fill(weights.soft * weight) +
         S::masked(own == static_cast<typename S::Int>(c), S::fill(weights.hard * weight));
}

inline int64_t pooled_channels(const RegionCrossEntropyParams& p) {
  return p.label_smoothing > 0 ? p.classes : 1;
}

template <class T>
class ProbabilityLosses : public LossAnchors<T> {
  using LossAnchors<T>::p_, LossAnchors<T>::out_;

 public:
  ProbabilityLosses(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
                    const RegionCrossEntropyGrad&)
      : LossAnchors<T>(params, state) {}

  template <class S>
  DYNPLAN_INLINE void tile(const MergedTile<S>& merged, const AnchorTile<S>& at) {
    using V = typename S::V;
    for (int64_t i = 0; i < at.count; ++i) {
      const typename S::M valid = at.own[i] >= 0;
      V loss{};
      for (int64_t c = 0; c < pooled_channels(p_); ++c) {
        // Divided, so that a class that is alone has exactly 1.
        const V v = S::at_least(valid ? merged.at(c, i) / merged.totals[i] : S::fill(1),
                                std::numeric_limits<T>::min());
        loss += target_share(out_.weights(), c, at.own[i]) * S::at_least(-S::log(v), 0);
      }
      S::store(at.losses[i], S::masked(valid, loss));
    }
  }
};

// s_q u_qc / (Z_q v_qc): the division by Z_q cancels the one inside v_qc.
template <class T>
class ProbabilityGradients : public SlopeAnchors<T> {
  using SlopeAnchors<T>::p_, SlopeAnchors<T>::weights_;

 public:
  using SlopeAnchors<T>::SlopeAnchors;

  template <class S>
  DYNPLAN_INLINE void tile(const MergedTile<S>& merged, const AnchorTile<S>& at) {
    using V = typename S::V;
    for (int64_t i = 0; i < at.count; ++i) {
      const V slope = S::load(at.losses[i]) * (1 / kProbabilityScale<T>);
      for (int64_t c = 0; c < pooled_channels(p_); ++c) {
        const V g = slope * target_share(weights_, c, at.own[i]) / merged.at(c, i);
        S::store(at.out[i] + c * at.class_stride, S::masked(at.own[i] >= 0, g));
      }
    }
  }
};

template <class T>
struct ProbabilityValues {
  using Planes = ProbabilityPlanes<T>;
  using Loss = ProbabilityLosses<T>;
  using Gradient = ProbabilityGradients<T>;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
