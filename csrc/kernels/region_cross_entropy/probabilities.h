// merge = probs. With t_pc = softmax(x_p)[c], and u_qc what class c counts in the loss of anchor q:
//
//   v_qc = sum a_qp t_pc,  l_q = -sum_c u_qc log v_qc
//   h_pc = sum_q w(p,q) [y_p = y_q] s_q u_qc / (Z_q v_qc)
//   d value / d x_p[c] = t_pc (sum_j t_pj h_pj - h_pc)
//
// Without label smoothing u_qc is 0 but for the label's class, which all pixels that agree with an anchor
// share: one number per pixel is pooled, the probability of its own label. With it every class is.
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

// Labels and probabilities of a march.
template <class T>
struct ProbabilityPlanes {
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;

  const bool smoothed;
  Planes<T> planes;  // `logits` holds t
  Scratch<T> memory;
  Ring<T> own;  // t of the pixel's own label; not when smoothed

  explicit ProbabilityPlanes(const RegionCrossEntropyParams& params)
      : smoothed(params.label_smoothing > 0), planes(params) {}

  const Ring<T>& all() const { return planes.logits; }
  const Ring<T>& pooled() const { return smoothed ? planes.logits : own; }
  int64_t channels() const { return smoothed ? planes.p.classes : 1; }

  void reset(const Box& box, int halo, int64_t label_planes, int64_t logit_planes) {
    planes.reset(box, halo, label_planes, logit_planes);
    if (!smoothed) own.reset(memory, planes.logits.box, 1, logit_planes);
  }

  // Loads plane d. Logsumexps of the pixels of `write`, where it is given, go to the map `lse` (N, D, H, W).
  void load(int64_t n, int64_t d, const Box* write = nullptr, T* lse = nullptr) {
    const RegionCrossEntropyParams& p = planes.p;
    planes.load(n, d);
    if (d < 0 || d >= p.size[0]) return;
    const Box& box = planes.logits.box;
    const int64_t begin = larger(0, box.begin[2]), end = smaller(p.size[2], box.end[2]);
    for (int64_t h = larger(0, box.begin[1]); h < smaller(p.size[1], box.end[1]); ++h) {
      const int64_t row = ((n * p.size[0] + d) * p.size[1] + h) * p.size[2];
      const bool written =
          write && d >= write->begin[0] && d < write->end[0] && h >= write->begin[1] && h < write->end[1];
      for (int64_t w = begin; w < end; w += S::lanes) {
        const V logsumexp = to_softmax(d, h, w);
        for (int lane = 0; written && lane < S::lanes; ++lane)
          if (w + lane >= write->begin[2] && w + lane < write->end[2]) lse[row + w + lane] = logsumexp[lane];
      }
    }
  }

 private:
  // A vector of pixels, in place; returns their logsumexp.
  V to_softmax(int64_t d, int64_t h, int64_t w) {
    const int64_t classes = planes.p.classes, stride = planes.logits.class_stride;
    T* at = planes.logits.at(d, h, w);
    V top = S::fill(-std::numeric_limits<T>::infinity()), sum{}, label_t{};
    for (int64_t c = 0; c < classes; ++c) top = S::max(S::load(at + c * stride), top);
    for (int64_t c = 0; c < classes; ++c) {
      const V term = S::exp(S::load(at + c * stride) - top);
      S::store(at + c * stride, term);
      sum += term;
    }
    const M label = S::load(planes.labels.at(d, h, w));
    const V scale = 1 / sum;
    for (int64_t c = 0; c < classes; ++c) {
      const V t = S::at_least(S::load(at + c * stride) * scale, std::numeric_limits<T>::min());
      S::store(at + c * stride, t);
      label_t = label == static_cast<Int>(c) ? t : label_t;
    }
    if (!smoothed) S::store(own.at(d, h, w), label_t);
    return top + S::log(sum);
  }
};

// What -log v_qc counts in the loss of anchors labelled `own`, for the c-th of the channels that are pooled.
template <class T>
DYNPLAN_INLINE typename Simd<T>::V target_share(const ClassWeights<T>& weights, bool smoothed, int64_t c,
                                                typename Simd<T>::M own) {
  using S = Simd<T>;
  if (!smoothed) return weights.weight ? weights.template of<S>(own) : S::fill(1);
  const T weight = weights.at(c);
  return S::fill(weights.soft * weight) +
         S::masked(own == static_cast<typename S::Int>(c), S::fill(weights.hard * weight));
}

template <class T>
class RegionProbsForward {
 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;

  RegionProbsForward(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state)
      : p_(params),
        strip_(Pool<T>::strip(params)),
        lse_(static_cast<T*>(state.lse)),
        out_(params, state),
        planes_(params),
        pool_(params, planes_.planes.labels, planes_.pooled(), planes_.channels()),
        merged_(planes_.channels()) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return gradient_bytes_per_column<T, Pool<T>>(p);
  }

  PowerSum run(int64_t n, const Box& box) {
    PowerSum total;
    const int64_t planes = 2 * p_.radius[0] + strip_;
    planes_.reset(box, 1, planes, planes);
    out_.reset(box, kRegionStrip);
    march_forward(
        p_, box, strip_, /*lead=*/0, [&](int64_t d) { planes_.load(n, d, &box, lse_); },
        [&](int64_t d, int64_t h, int64_t count) { rows(n, d, h, count, box, total); });
    return total;
  }

  const RegionBadLabel& bad() const { return planes_.planes.label_rows.bad(); }

 private:
  void rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box, PowerSum& total) {
    const Ring<Int>& labels = planes_.planes.labels;
    const int64_t margin = box.begin[2] - labels.box.begin[2];
    pool_.aim(d, h, count, /*anchors=*/false);
    for (int64_t x = 0; x < box.extent(2); x += S::lanes) {
      merged_.pool(pool_, margin + x);
      for (int64_t i = 0; i < count; ++i) {
        if (out_.counts()) S::store(out_.agreement(i) + x, pool_.agreement(i, margin + x));
        vector(S::load(labels.at(d + i, h, box.begin[2] + x)), i, out_.losses(i) + x);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      out_.write(i, n, d + i, h, box, 0, /*with_lse=*/false, labels.at(d + i, h, box.begin[2]), total);
    }
  }

  // Loss of row i of the merged tile.
  DYNPLAN_INLINE void vector(M own, int64_t i, T* losses) const {
    const M valid = own >= 0;
    V loss{};
    for (int64_t c = 0; c < planes_.channels(); ++c) {
      const V v = S::at_least(valid ? merged_.at(c, i) / merged_.totals[i] : S::fill(1),
                              std::numeric_limits<T>::min());
      loss += target_share(out_.weights(), planes_.smoothed, c, own) * S::at_least(-S::log(v), 0);
    }
    S::store(losses, S::masked(valid, loss));
  }

  const RegionCrossEntropyParams& p_;
  int64_t strip_;
  T* lse_;
  LossRows<T> out_;
  ProbabilityPlanes<T> planes_;
  Pool<T> pool_;
  MergedTile<S> merged_;
};

template <class T>
class RegionProbsBackward {
 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;

  RegionProbsBackward(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
                      const RegionCrossEntropyGrad& grad)
      : p_(params),
        strip_(Pool<T>::strip(params)),
        weights_(params),
        slopes_(params, state, grad),
        planes_(params),
        merge_(params, planes_.planes.labels, planes_.pooled(), planes_.channels()),
        gather_(params, planes_.planes.labels, anchors_, planes_.channels()),
        merged_(planes_.channels()) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return gradient_bytes_per_column<T, Pool<T>>(p);
  }

  template <class Store>
  void run(int64_t n, const Box& box, const DirectRows<T>&, Store store) {
    const int64_t between = planes_between(p_, strip_);
    planes_.reset(box, 2, between + p_.radius[0], between + p_.radius[0]);
    anchors_.reset(anchor_memory_, anchor_box<T>(p_, box), planes_.channels(), between);
    slopes_.reset(anchors_.box, kRegionStrip);
    row_.reset(row_memory_, box.row(), p_.classes, 1);
    march_backward(
        p_, box, strip_, [&](int64_t d) { planes_.load(n, d); },
        [&](int64_t d, int64_t h, int64_t count) { anchor_rows(n, d, h, count, box); },
        [&](int64_t d, int64_t h, int64_t count) { gather_rows(d, h, count, box, store); });
  }

 private:
  // s_q u_qc / (Z_q v_qc): the division by Z_q cancels the one inside v_qc.
  void anchor_rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box) {
    const int64_t radius = p_.radius[2], begin = box.begin[2] - radius, width = box.extent(2) + 2 * radius;
    const int64_t column = ring_margin<T>(p_) - radius;
    for (int64_t i = 0; i < count; ++i) slopes_.load(i, n, d + i, h, anchors_.box, /*with_lse=*/false);
    merge_.aim(d, h, count, /*anchors=*/false);
    for (int64_t x = 0; x < width; x += S::lanes) {
      merged_.pool(merge_, column + x);
      for (int64_t i = 0; i < count; ++i) {
        const M own = S::load(planes_.planes.labels.at(d + i, h, begin + x)), valid = own >= 0;
        const V slope = S::load(slopes_.slopes(i) + column + x) * (1 / kProbabilityScale<T>);
        T* out = anchors_.at(d + i, h, begin + x);
        for (int64_t c = 0; c < planes_.channels(); ++c) {
          const V g = slope * target_share(weights_, planes_.smoothed, c, own) / merged_.at(c, i);
          S::store(out + c * anchors_.class_stride, S::masked(valid, g));
        }
      }
    }
  }

  template <class Store>
  void gather_rows(int64_t d, int64_t h, int64_t count, const Box& box, Store store) {
    gather_.aim(d, h, count, /*anchors=*/true);
    // Tiles of all rows first, into sums that the rows then use one by one.
    gathered_.reset(gathered_memory_, box.row(), planes_.channels(), kRegionStrip);
    for (int64_t x = 0; x < box.extent(2); x += S::lanes) {
      TileOutput<T> out{{}, gathered_.class_stride};
      for (int64_t i = 0; i < kRegionStrip; ++i)
        out.row[i] = gathered_.data + smaller(i, count - 1) * gathered_.plane_stride + x;
      gather_.run(ring_margin<T>(p_) + x, out, nullptr);
    }
    for (int64_t i = 0; i < count; ++i) {
      const T* gathered = gathered_.data + i * gathered_.plane_stride;
      for (int64_t x = 0; x < box.extent(2); x += S::lanes)
        if (planes_.smoothed)
          smoothed_gradient(d + i, h, box.begin[2] + x, gathered + x, row_.data + x);
        else
          gradient(d + i, h, box.begin[2] + x, gathered + x, row_.data + x);
      store(d + i, h, row_.data, row_.class_stride);
    }
  }

  // Of a vector of pixels from (d, h, w) on, whose h_p of the label's class is gathered: the other classes'
  // are 0.
  DYNPLAN_INLINE void gradient(int64_t d, int64_t h, int64_t w, const T* gathered, T* out) const {
    const Ring<T>& t = planes_.all();
    const M own = S::load(planes_.planes.labels.at(d, h, w));
    const V r = S::load(gathered) * (S::load(planes_.own.at(d, h, w)) * kProbabilityScale<T>);
    const T* from = t.at(d, h, w);
    for (int64_t c = 0; c < p_.classes; ++c) {
      const V one = S::masked(own == static_cast<Int>(c), S::fill(1));
      const V g = r * (S::load(from + c * t.class_stride) - one);
      S::store(out + c * row_.class_stride, S::masked(own >= 0, g));
    }
  }

  DYNPLAN_INLINE void smoothed_gradient(int64_t d, int64_t h, int64_t w, const T* gathered, T* out) const {
    const Ring<T>& t = planes_.all();
    const M valid = S::load(planes_.planes.labels.at(d, h, w)) >= 0;
    const T* from = t.at(d, h, w);
    V sum{};
    for (int64_t c = 0; c < p_.classes; ++c) {
      const V probability = S::load(from + c * t.class_stride);
      const V product = probability * kProbabilityScale<T> * S::load(gathered + c * gathered_.class_stride);
      S::store(out + c * row_.class_stride, product);
      sum += product;
    }
    for (int64_t c = 0; c < p_.classes; ++c) {
      T* at = out + c * row_.class_stride;
      S::store(at, S::masked(valid, S::load(from + c * t.class_stride) * sum - S::load(at)));
    }
  }

  const RegionCrossEntropyParams& p_;
  int64_t strip_;
  ClassWeights<T> weights_;
  SlopeRows<T> slopes_;
  ProbabilityPlanes<T> planes_;
  Ring<T> anchors_, gathered_;
  Ring<T> row_;  // of gradient
  Scratch<T> anchor_memory_, gathered_memory_, row_memory_;
  Pool<T> merge_, gather_;
  MergedTile<S> merged_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
