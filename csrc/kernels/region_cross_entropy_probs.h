// merge = probs. Every pixel that agrees with an anchor shares its label, so one number per pixel is pooled,
// the probability t_p of its own label:
//
//   v_q = sum a_qp t_p,  l_q = -weight[y_q] log v_q
//   d value / d x_p = (softmax(x_p) - e_{y_p}) t_p sum_q w(p,q) [y_p = y_q] s_q weight[y_q] / (Z_q v_q)
//
// The logits need no halo of their own in the formula; t does, and is made from the same rows.
#pragma once

#include "kernels/region_cross_entropy_backward.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Labels, logits and t of a march.
template <class T>
struct ProbabilityPlanes {
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;

  Planes<T> planes;
  Scratch<T> memory;
  Ring<T> probability;
  T* lse;  // logsumexp(x_p) of all pixels, (N, D, H, W)

  ProbabilityPlanes(const RegionCrossEntropyParams& params, void* state_lse)
      : planes(params), lse(static_cast<T*>(state_lse)) {}

  void reset(const Box& box, int halo, int64_t label_planes, int64_t logit_planes) {
    planes.reset(box, halo, label_planes, logit_planes);
    probability.reset(memory, planes.logits.box, 1, logit_planes);
  }

  T* lse_at(int64_t n, int64_t d, int64_t h, int64_t w) const {
    const int64_t* size = planes.p.size;
    return lse + ((n * size[0] + d) * size[1] + h) * size[2] + w;
  }

  // Loads plane d and makes its t. Logsumexps come from the state, or are made and written there inside
  // `write`.
  void load(int64_t n, int64_t d, const Box* write) {
    const RegionCrossEntropyParams& p = planes.p;
    planes.load(n, d);
    if (d < 0 || d >= p.size[0]) return;
    const Box& box = probability.box;
    const int64_t begin = larger(0, box.begin[2]), end = smaller(p.size[2], box.end[2]);
    for (int64_t h = larger(0, box.begin[1]); h < smaller(p.size[1], box.end[1]); ++h)
      for (int64_t w = begin; w < end; w += S::lanes) {
        const M own = S::load(planes.labels.at(d, h, w));
        const T* logits = planes.logits.at(d, h, w);
        V logsumexp{};
        if (write) {
          logsumexp = log_sum_exp(logits);
          const bool inside =
              d >= write->begin[0] && d < write->end[0] && h >= write->begin[1] && h < write->end[1];
          for (int lane = 0; inside && lane < S::lanes; ++lane)
            if (w + lane >= write->begin[2] && w + lane < write->end[2])
              *lse_at(n, d, h, w + lane) = logsumexp[lane];
        } else {
          std::memcpy(&logsumexp, lse_at(n, d, h, w), smaller(S::lanes, end - w) * sizeof(T));
        }
        V label_logit{};
        for (int64_t c = 0; c < p.classes; ++c)
          label_logit =
              own == static_cast<Int>(c) ? S::load(logits + c * planes.logits.class_stride) : label_logit;
        // The floor keeps a window of hopeless pixels finite, and its gradient that of cross-entropy.
        const V t = S::at_least(S::exp(label_logit - logsumexp), std::numeric_limits<T>::min());
        S::store(probability.at(d, h, w), S::masked(own >= 0, t));
      }
  }

  V log_sum_exp(const T* logits) const {
    const int64_t stride = planes.logits.class_stride;
    V top = S::fill(-std::numeric_limits<T>::infinity()), sum{};
    for (int64_t c = 0; c < planes.p.classes; ++c) top = S::max(S::load(logits + c * stride), top);
    for (int64_t c = 0; c < planes.p.classes; ++c) sum += S::exp(S::load(logits + c * stride) - top);
    return top + S::log(sum);
  }
};

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
        out_(params, state),
        planes_(params, state.lse),
        pool_(params, planes_.planes.labels, planes_.probability, 1),
        merged_(1) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return RegionForward<T>::bytes_per_column(p);
  }

  PowerSum run(int64_t n, const Box& box) {
    PowerSum total;
    const int64_t planes = 2 * p_.radius[0] + strip_;
    planes_.reset(box, 1, planes, planes);
    out_.reset(box);
    march_forward(
        p_, box, strip_, [&](int64_t d) { planes_.load(n, d, &box); },
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
        vector(S::load(labels.at(d + i, h, box.begin[2] + x)), merged_.at(0, i), merged_.totals[i],
               out_.losses(i) + x);
      }
    }
    for (int64_t i = 0; i < count; ++i)
      out_.write(i, n, d + i, h, box, 0, labels.at(d + i, h, box.begin[2]), /*with_lse=*/false, total);
  }

  DYNPLAN_INLINE void vector(M own, V sum, V total_weight, T* losses) const {
    const M valid = own >= 0;
    V loss = -S::log(valid ? sum / total_weight : S::fill(1));
    if (out_.weights().weight) loss *= out_.weights().of(own);
    S::store(losses, S::masked(valid, S::at_least(loss, 0)));
  }

  const RegionCrossEntropyParams& p_;
  int64_t strip_;
  LossRows<T> out_;
  ProbabilityPlanes<T> planes_;
  Pool<T> pool_;
  MergedTile<T> merged_;
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
        planes_(params, state.lse),
        merge_(params, planes_.planes.labels, planes_.probability, 1),
        gather_(params, planes_.planes.labels, anchors_, 1),
        merged_(1) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return RegionBackward<T>::bytes_per_column(p);
  }

  template <class Store>
  void run(int64_t n, const Box& box, const DirectRows<T>&, Store store) {
    const int64_t between = planes_between(p_, strip_);
    planes_.reset(box, 2, between + p_.radius[0], between + p_.radius[0]);
    anchors_.reset(anchor_memory_, anchor_box(p_, box), 1, between);
    slopes_.reset(anchors_.box);
    row_.reset(row_memory_, box.row(), p_.classes, 1);
    march_backward(
        p_, box, strip_, [&](int64_t d) { planes_.load(n, d, nullptr); },
        [&](int64_t d, int64_t h, int64_t count) { anchor_rows(n, d, h, count, box); },
        [&](int64_t d, int64_t h, int64_t count) { gather_rows(n, d, h, count, box, store); });
  }

 private:
  // s_q weight[y_q] / (Z_q v_q): the division by Z_q cancels the one inside v_q.
  void anchor_rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box) {
    const int64_t radius = p_.radius[2], begin = box.begin[2] - radius, width = box.extent(2) + 2 * radius;
    for (int64_t i = 0; i < count; ++i) slopes_.load(i, n, d + i, h, anchors_.box, /*with_lse=*/false);
    merge_.aim(d, h, count, /*anchors=*/false);
    for (int64_t x = 0; x < width; x += S::lanes) {
      merged_.pool(merge_, radius + x);
      for (int64_t i = 0; i < count; ++i) {
        const M own = S::load(planes_.planes.labels.at(d + i, h, begin + x)), valid = own >= 0;
        V g = S::load(slopes_.slopes(i) + radius + x) / (valid ? merged_.at(0, i) : S::fill(1));
        if (weights_.weight) g *= weights_.of(own);
        S::store(anchors_.at(d + i, h, begin + x), S::masked(valid, g));
      }
    }
  }

  template <class Store>
  void gather_rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box, Store store) {
    gather_.aim(d, h, count, /*anchors=*/true);
    // Tiles of all rows first, into sums that the rows then use one by one.
    gathered_.reset(gathered_memory_, box.row(), 1, kRegionStrip);
    for (int64_t x = 0; x < box.extent(2); x += S::lanes) {
      TileOutput<T> out{{}, 0};
      for (int64_t i = 0; i < kRegionStrip; ++i)
        out.row[i] = gathered_.data + smaller(i, count - 1) * gathered_.plane_stride + x;
      gather_.run(2 * p_.radius[2] + x, out, nullptr);
    }
    for (int64_t i = 0; i < count; ++i) {
      gradient_row(n, d + i, h, box, gathered_.data + i * gathered_.plane_stride);
      store(d + i, h, row_.data, row_.class_stride);
    }
  }

  void gradient_row(int64_t n, int64_t d, int64_t h, const Box& box, const T* gathered) {
    const Ring<T>& logits = planes_.planes.logits;
    const T* lse_row = planes_.lse_at(n, d, h, box.begin[2]);
    for (int64_t x = 0; x < box.extent(2); x += S::lanes) {
      const M own = S::load(planes_.planes.labels.at(d, h, box.begin[2] + x));
      const V r = S::load(gathered + x) * S::load(planes_.probability.at(d, h, box.begin[2] + x));
      V lse{};
      std::memcpy(&lse, lse_row + x, smaller(S::lanes, box.extent(2) - x) * sizeof(T));
      const T* from = logits.at(d, h, box.begin[2] + x);
      for (int64_t c = 0; c < p_.classes; ++c) {
        const V softmax = S::exp(S::load(from + c * logits.class_stride) - lse);
        const V one = S::masked(own == static_cast<Int>(c), S::fill(1));
        S::store(row_.data + c * row_.class_stride + x, r * (softmax - one));
      }
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
  MergedTile<T> merged_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
