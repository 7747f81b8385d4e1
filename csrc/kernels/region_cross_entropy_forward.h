// Forward of merge = logits: (losses, lse) per anchor, agreement, and the sums of the Minkowski mean.
// Included per instruction set. Logits are read once (plus halos); nothing else of their size is written.
#pragma once

#include "kernels/region_cross_entropy_anchors.h"
#include "kernels/region_cross_entropy_march.h"
#include "kernels/region_cross_entropy_pool.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// One segment of a strip: sums of every class, and normalisers. Row i at i * kRegionSegment.
template <class T>
struct MergedBlock {
  // An odd number of cache lines keeps classes out of each other's sets.
  static constexpr int64_t kClassStride = kRegionStrip * kRegionSegment + 64 / sizeof(T);
  std::unique_ptr<T[]> sums;
  alignas(64) T totals[kRegionStrip * kRegionSegment];

  explicit MergedBlock(int64_t classes) : sums(new T[classes * kClassStride]) {}

  void pool(Pool<T>& pool, int64_t column, int64_t count) {
    BlockOutput<T> out{{}, kClassStride};
    for (int64_t i = 0; i < kRegionStrip; ++i) out.row[i] = sums.get() + i * kRegionSegment;
    pool.run(column, count, out, totals);
  }
};

// The losses of a strip of rows, as they leave the forward of either merge.
template <class T>
class LossRows {
 public:
  LossRows(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state)
      : p_(params), state_(state), weights_(params) {}

  const ClassWeights<T>& weights() const { return weights_; }
  bool counts() const { return state_.agreement != nullptr; }
  void reset(const Box& box) { rows_.reset(memory_, box.row(), 3, kRegionStrip); }

  T* losses(int64_t i) { return rows_.data + i * rows_.plane_stride; }
  T* lse(int64_t i) { return losses(i) + rows_.class_stride; }
  T* agreement(int64_t i) { return lse(i) + rows_.class_stride; }

  // Writes the anchors of row (d, h), which is the i-th of the strip; its logsumexps too where `with_lse`.
  template <class Int>
  void write(int64_t i, int64_t n, int64_t d, int64_t h, const Box& box, const Int* labels, bool with_lse,
             PowerSum& total) {
    const AnchorRow anchors(p_, n, d, h, box.begin[2], box.end[2]);
    const int64_t first = anchors.first - box.begin[2];
    T* out = static_cast<T*>(state_.losses) + anchors.index;
    copy(losses(i) + first, anchors, out);
    if (with_lse) copy(lse(i) + first, anchors, static_cast<T*>(state_.lse) + anchors.index);
    if (counts()) copy(agreement(i) + first, anchors, state_.agreement + anchors.index);
    add_row(total, out, anchors.count, labels + first, anchors.step, weights_);
  }

 private:
  template <class Out>
  static void copy(const T* from, const AnchorRow& anchors, Out* to) {
    for (int64_t i = 0; i < anchors.count; ++i) to[i] = static_cast<Out>(from[i * anchors.step]);
  }

  const RegionCrossEntropyParams& p_;
  const RegionCrossEntropyState& state_;
  ClassWeights<T> weights_;
  Scratch<T> memory_;
  Ring<T> rows_;
};

template <class T>
class RegionForward {
 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;

  RegionForward(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state)
      : p_(params),
        strip_(Pool<T>::strip(params)),
        out_(params, state),
        planes_(params),
        pool_(params, planes_.labels, planes_.logits, params.classes),
        merged_(params.classes) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return (2 * p.radius[0] + Pool<T>::strip(p)) * p.classes * static_cast<int64_t>(sizeof(T));
  }

  PowerSum run(int64_t n, const Box& box) {
    PowerSum total;
    const int64_t planes = 2 * p_.radius[0] + strip_;
    planes_.reset(box, 1, planes, planes);
    out_.reset(box);
    march_forward(
        p_, box, strip_, [&](int64_t d) { planes_.load(n, d); },
        [&](int64_t d, int64_t h, int64_t count) { rows(n, d, h, count, box, total); });
    return total;
  }

  const RegionBadLabel& bad() const { return planes_.label_rows.bad(); }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);

  void rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box, PowerSum& total) {
    const int64_t margin = box.begin[2] - planes_.labels.box.begin[2];
    pool_.aim(d, h, count, /*anchors=*/false);
    for (int64_t x = 0; x < box.extent(2); x += kRegionSegment) {
      const int64_t columns = smaller(kRegionSegment, box.extent(2) - x);
      merged_.pool(pool_, margin + x, columns);
      for (int64_t i = 0; i < count; ++i) {
        const Int* own_row = planes_.labels.at(d + i, h, box.begin[2] + x);
        for (int64_t j = 0; j < columns; j += S::lanes) {
          if (j % kLine == 0 && p_.low[0] == 0)
            prefetch_logits(p_, n, d + p_.radius[0] + strip_ + i, h, box.begin[2] + x + j);
          if (out_.counts()) S::store(out_.agreement(i) + x + j, pool_.agreement(i, margin + x + j));
          const int64_t at = i * kRegionSegment + j;
          vector(S::load(own_row + j), S::load(merged_.totals + at), merged_.sums.get() + at,
                 out_.losses(i) + x + j, out_.lse(i) + x + j);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i)
      out_.write(i, n, d + i, h, box, planes_.labels.at(d + i, h, box.begin[2]), /*with_lse=*/true, total);
  }

  // Loss and logsumexp of one vector of centres from its sums.
  DYNPLAN_INLINE void vector(M own, V total_weight, const T* merged, T* losses, T* lse) {
    constexpr int64_t stride = MergedBlock<T>::kClassStride;
    const ClassWeights<T>& weights = out_.weights();
    const M valid = own >= 0;
    const V scale = S::masked(valid, T(1) / (valid ? total_weight : S::fill(1)));
    V top = S::fill(-std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < p_.classes; ++c) top = S::max(S::load(merged + c * stride), top);
    // The label's own term is left out of the sum, so that the small losses of pixels that are clearly right
    // keep their digits. Differences are taken before scaling: a fused multiply-add of the product would not
    // give exactly 0 for the largest.
    V others{}, label_sum{};
    const auto add = [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) others += S::exp((S::load(merged + c * stride) - top) * scale);
    };
    if (const Int label = own[0]; label >= 0 && S::all(own == label)) {
      add(0, label);
      add(label + 1, p_.classes);
      label_sum = S::load(merged + label * stride);
    } else {
      for (int64_t c = 0; c < p_.classes; ++c) {
        const V sum = S::load(merged + c * stride);
        const M hit = own == static_cast<Int>(c);
        others += S::unmasked(hit, S::exp((sum - top) * scale));
        label_sum = hit ? sum : label_sum;
      }
    }
    const V gap = S::log1p(others + (S::exp((label_sum - top) * scale) - T(1)));
    const V logsumexp = top * scale + gap;
    V loss = (top - label_sum) * scale + gap;
    if (weights.weight || weights.soft > 0) {
      V weight;
      for (int lane = 0; lane < S::lanes; ++lane) weight[lane] = weights.of(own[lane]);
      loss = weights.hard * weight * loss;
      V soft{};
      for (int64_t c = 0; weights.soft > 0 && c < p_.classes; ++c)
        soft += weights.at(c) * (logsumexp - S::load(merged + c * stride) * scale);
      loss += weights.soft * soft;
    }
    S::store(losses, S::masked(valid, loss));
    S::store(lse, S::masked(valid, logsumexp));
  }

  const RegionCrossEntropyParams& p_;
  int64_t strip_;
  LossRows<T> out_;
  Planes<T> planes_;
  Pool<T> pool_;
  MergedBlock<T> merged_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
