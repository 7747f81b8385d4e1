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

  void reset(const Box& box, int halo) {
    planes.reset(box, halo);
    probability.reset(memory, planes.logits.box, 1, planes.logits.planes);
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
        state_(state),
        weights_(params),
        planes_(params, state.lse),
        pool_(params, planes_.planes.labels, planes_.planes.uniform, planes_.probability, 1) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return RegionForward<T>::bytes_per_column(p);
  }

  PowerSum run(int64_t n, const Box& box) {
    const int r = p_.radius[0];
    PowerSum total;
    planes_.reset(box, 1);
    row_.reset(row_memory_, box.row(), 4, 1);
    for (int64_t d = box.begin[0] - r; d < box.begin[0] + r; ++d) planes_.load(n, d, &box);
    for (int64_t d = box.begin[0]; d < box.end[0]; ++d) {
      planes_.load(n, d + r, &box);
      if (d % p_.stride[0] != 0) continue;
      for (int64_t h = box.begin[1]; h < box.end[1]; ++h)
        if (h % p_.stride[1] == 0) row(n, d, h, box, total);
    }
    return total;
  }

  const RegionBadLabel& bad() const { return planes_.planes.label_rows.bad(); }

 private:
  void row(int64_t n, int64_t d, int64_t h, const Box& box, PowerSum& total) {
    const Ring<Int>& labels = planes_.planes.labels;
    const int64_t margin = box.begin[2] - labels.box.begin[2];
    const Int* own_row = labels.at(d, h, box.begin[2]);
    T *losses = row_.data, *agreement = losses + row_.class_stride;
    T *sums = agreement + row_.class_stride, *totals = sums + row_.class_stride;
    pool_.aim(d, h, /*anchors=*/false);
    for (int64_t x = 0; x < box.extent(2); x += Pool<T>::kSegment)
      pool_.run(own_row + x, margin + x, margin + x, smaller(Pool<T>::kSegment, box.extent(2) - x), sums + x,
                0, totals + x);
    for (int64_t x = 0; x < box.extent(2); x += S::lanes) {
      const M own = S::load(own_row + x), valid = own >= 0;
      if (state_.agreement) S::store(agreement + x, pool_.agreement(own, margin + x));
      V loss = -S::log(valid ? S::load(sums + x) / S::load(totals + x) : S::fill(1));
      if (weights_.weight)
        for (int lane = 0; lane < S::lanes; ++lane) loss[lane] *= weights_.of(own[lane]);
      S::store(losses + x, S::masked(valid, S::at_least(loss, 0)));
    }
    const AnchorRow anchors(p_, n, d, h, box.begin[2], box.end[2]);
    T* losses_out = static_cast<T*>(state_.losses) + anchors.index;
    const int64_t first = anchors.first - box.begin[2];
    for (int64_t i = 0; i < anchors.count; ++i) {
      losses_out[i] = losses[first + i * anchors.step];
      if (state_.agreement)
        state_.agreement[anchors.index + i] = static_cast<int16_t>(agreement[first + i * anchors.step]);
    }
    add_row(total, losses_out, anchors.count, own_row + first, anchors.step, weights_);
  }

  const RegionCrossEntropyParams& p_;
  const RegionCrossEntropyState& state_;
  ClassWeights<T> weights_;
  ProbabilityPlanes<T> planes_;
  Pool<T> pool_;
  Scratch<T> row_memory_;
  Ring<T> row_;
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
        weights_(params),
        slopes_(params, state, grad),
        planes_(params, state.lse),
        merge_(params, planes_.planes.labels, planes_.planes.uniform, planes_.probability, 1),
        gather_(params, planes_.planes.labels, planes_.planes.uniform, anchors_, 1) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return RegionBackward<T>::bytes_per_column(p);
  }

  template <class Store>
  void run(int64_t n, const Box& box, const DirectRows<T>&, Store store) {
    const int r = p_.radius[0];
    planes_.reset(box, 2);
    anchors_.reset(anchor_memory_, box.grown(p_.radius, 1), 1, 2 * r + 1);
    row_.reset(row_memory_, anchors_.box.row(), larger(2, p_.classes), 1);
    for (int64_t d = box.begin[0] - 2 * r; d < box.begin[0]; ++d) planes_.load(n, d, nullptr);
    for (int64_t q = box.begin[0] - r; q < box.end[0] + r; ++q) {
      planes_.load(n, q + r, nullptr);
      if (q >= 0 && q < p_.size[0] && q % p_.stride[0] == 0)
        for (int64_t h = larger(0, anchors_.box.begin[1]); h < smaller(p_.size[1], anchors_.box.end[1]); ++h)
          if (h % p_.stride[1] == 0) anchor_row(n, q, h);
      const int64_t d = q - r;
      if (d < box.begin[0]) continue;
      for (int64_t h = box.begin[1]; h < box.end[1]; ++h) {
        gather_row(n, d, h, box);
        store(d, h, box.begin[2], row_.data, row_.class_stride);
      }
    }
  }

 private:
  // s_q weight[y_q] / (Z_q v_q): the division by Z_q cancels the one inside v_q.
  void anchor_row(int64_t n, int64_t d, int64_t h) {
    const Ring<Int>& labels = planes_.planes.labels;
    const Box& box = anchors_.box;
    const int64_t margin = box.begin[2] - labels.box.begin[2];
    T *slopes = row_.data, *sums = slopes + row_.class_stride, *out = anchors_.at(d, h, box.begin[2]);
    for (int64_t x = 0; x < row_.class_stride; ++x) slopes[x] = 0;
    const AnchorRow row(p_, n, d, h, larger(0, box.begin[2]), smaller(p_.size[2], box.end[2]));
    slopes_.row(p_, row, n, d, h, slopes + row.first - box.begin[2]);
    merge_.aim(d, h, /*anchors=*/false);
    const Int* own_row = labels.at(d, h, box.begin[2]);
    for (int64_t x = 0; x < box.extent(2); x += Pool<T>::kSegment)
      merge_.run(own_row + x, margin + x, margin + x, smaller(Pool<T>::kSegment, box.extent(2) - x), sums + x,
                 0, nullptr);
    for (int64_t x = 0; x < box.extent(2); x += S::lanes) {
      const M own = S::load(own_row + x), valid = own >= 0;
      V g = S::load(slopes + x) / (valid ? S::load(sums + x) : S::fill(1));
      if (weights_.weight)
        for (int lane = 0; lane < S::lanes; ++lane) g[lane] *= weights_.of(own[lane]);
      S::store(out + x, S::masked(valid, g));
    }
  }

  void gather_row(int64_t n, int64_t d, int64_t h, const Box& box) {
    const Ring<Int>& labels = planes_.planes.labels;
    const Ring<T>& logits = planes_.planes.logits;
    const int64_t margin = box.begin[2] - anchors_.box.begin[2];
    const Int* own_row = labels.at(d, h, box.begin[2]);
    const T* lse_row = planes_.lse_at(n, d, h, box.begin[2]);
    gather_.aim(d, h, /*anchors=*/true);
    T* gathered = row_.data;  // class 0's row, overwritten last
    for (int64_t x = 0; x < box.extent(2); x += Pool<T>::kSegment)
      gather_.run(own_row + x, 2 * margin + x, margin + x, smaller(Pool<T>::kSegment, box.extent(2) - x),
                  gathered + x, 0, nullptr);
    for (int64_t x = 0; x < box.extent(2); x += S::lanes) {
      const M own = S::load(own_row + x);
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
  ClassWeights<T> weights_;
  AnchorSlopes<T> slopes_;
  ProbabilityPlanes<T> planes_;
  Ring<T> anchors_;
  Ring<T> row_;  // slopes, then gradient
  Scratch<T> anchor_memory_, row_memory_;
  Pool<T> merge_, gather_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
