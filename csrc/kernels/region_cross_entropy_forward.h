// Forward of merge = logits: (losses, lse) per anchor, agreement, and the sums of the Minkowski mean.
// Included per instruction set. Logits are read once (plus halos); nothing else of their size is written.
#pragma once

#include "kernels/region_cross_entropy_anchors.h"
#include "kernels/region_cross_entropy_march.h"
#include "kernels/region_cross_entropy_pool.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// The sums of every class of one tile, and their normalisers. Vectors are contiguous: of class c, row i at
// (c * kRegionStrip + i) * lanes.
template <class T>
struct MergedTile {
  using S = Simd<T>;
  static constexpr int64_t kClassStride = kRegionStrip * S::lanes;
  Scratch<T> memory;
  T* sums;
  typename S::V totals[kRegionStrip] = {};

  explicit MergedTile(int64_t classes) : sums(memory.get(classes * kClassStride)) {}

  void pool(Pool<T>& pool, int64_t column) {
    TileOutput<T> out{{}, kClassStride};
    for (int64_t i = 0; i < kRegionStrip; ++i) out.row[i] = sums + i * S::lanes;
    pool.run(column, out, totals);
  }
  T* address(int64_t c, int64_t i) const { return sums + c * kClassStride + i * S::lanes; }
  typename S::V at(int64_t c, int64_t i) const { return S::load(address(c, i)); }
  void set(int64_t c, int64_t i, typename S::V v) const { S::store(address(c, i), v); }

  // Each row's largest sums.
  DYNPLAN_INLINE void tops(int64_t classes, typename S::V (&top)[kRegionStrip]) const {
    for (typename S::V& v : top) v = S::fill(-std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < classes; ++c)
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRegionStrip; ++i) top[i] = S::max(at(c, i), top[i]);
  }

  // Of row i, of centres with labels `own`: 1 / Z, or 0 where the label is ignored.
  DYNPLAN_INLINE typename S::V scale(int64_t i, typename S::M own) const {
    const typename S::M valid = own >= 0;
    return S::masked(valid, T(1) / (valid ? totals[i] : S::fill(1)));
  }
};

// Cross-entropies of the merged vectors of a tile, row by row, before class weights.
template <class T>
struct MergedLosses {
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  V loss[kRegionStrip];
  V gap[kRegionStrip];         // logsumexp less the largest
  V mass[kRegionStrip];        // sum over classes of exp((z - top) scale)
  V label_term[kRegionStrip];  // the label's own term of it
  V label_sum[kRegionStrip];

  // Of the tile that `pool` planned and `merged` holds, which loses the sums of labels. `each(i, c, term)`
  // gets the terms of `mass`, with 0 for the label's own.
  template <class Each>
  DYNPLAN_INLINE MergedLosses(const Pool<T>& pool, const MergedTile<T>& merged, int64_t classes,
                              int64_t count, const M* own, const V* scale, Each each) {
    V top[kRegionStrip];
    merged.tops(classes, top);
    // The label's own term is left out of the sum, so that the small losses of pixels that are clearly right
    // keep their digits. It is taken out before, so that the loop over classes has no branch. Differences are
    // taken before scaling: a fused multiply-add of the product would not give exactly 0 for the largest.
    for (int64_t i = 0; i < count; ++i) {
      label_sum[i] = V{};
      pool.for_labels([&](int64_t c) __attribute__((always_inline)) {
        const M hit = own[i] == static_cast<typename S::Int>(c);
        const V sum = merged.at(c, i);
        label_sum[i] = hit ? sum : label_sum[i];
        merged.set(c, i, hit ? S::fill(-std::numeric_limits<T>::max()) : sum);
      });
    }
    // All rows' sums, then what follows from them: logarithms take long, but not those of several rows.
    for (int64_t i = 0; i < count; ++i) {
      V others{};
      for (int64_t c = 0; c < classes; ++c) {
        const V term = S::exp((merged.at(c, i) - top[i]) * scale[i]);
        each(i, c, term);
        others += term;
      }
      mass[i] = others;
    }
    for (int64_t i = 0; i < count; ++i) {
      label_term[i] = S::exp((label_sum[i] - top[i]) * scale[i]);
      gap[i] = S::log1p(mass[i] + (label_term[i] - T(1)));
      mass[i] += label_term[i];
      loss[i] = (top[i] - label_sum[i]) * scale[i] + gap[i];
    }
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
  // Rows as wide as those of `box`.
  void reset(const Box& box) { rows_.reset(memory_, box.row(), 3, kRegionStrip); }

  T* losses(int64_t i) { return rows_.data + i * rows_.plane_stride; }
  T* lse(int64_t i) { return losses(i) + rows_.class_stride; }
  T* agreement(int64_t i) { return lse(i) + rows_.class_stride; }

  // Writes the anchors of row (d, h) of the box, which is the i-th of the strip and has `margin` columns
  // before the box; State's `lse` too where `with_lse`. `labels` begin with the box.
  template <class Int>
  void write(int64_t i, int64_t n, int64_t d, int64_t h, const Box& box, int64_t margin, const Int* labels,
             bool with_lse, PowerSum& total) {
    const AnchorRow anchors(p_, n, d, h, box.begin[2], box.end[2]);
    const int64_t first = anchors.first - box.begin[2], column = margin + first;
    T* out = static_cast<T*>(state_.losses) + anchors.index;
    copy(losses(i) + column, anchors, out);
    if (with_lse) copy(lse(i) + column, anchors, static_cast<T*>(state_.lse) + anchors.index);
    if (counts()) copy(agreement(i) + column, anchors, state_.agreement + anchors.index);
    add_row(total, out, anchors.count, labels + first, anchors.step, weights_);
  }

 private:
  template <class Out>
  static void copy(const T* from, const AnchorRow& anchors, Out* to) {
    if (std::is_same_v<Out, T> && anchors.step == 1) {
      std::memcpy(to, from, anchors.count * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < anchors.count; ++i) to[i] = static_cast<Out>(from[i * anchors.step]);
  }

  const RegionCrossEntropyParams& p_;
  const RegionCrossEntropyState& state_;
  ClassWeights<T> weights_;
  Scratch<T> memory_;
  Ring<T> rows_;
};

// Of rings of logits and of anchors' gradients.
template <class T>
int64_t gradient_bytes_per_column(const RegionCrossEntropyParams& p) {
  const int64_t strip = Pool<T>::strip(p);
  return (2 * p.radius[0] + strip + planes_between(p, strip)) * p.classes * static_cast<int64_t>(sizeof(T));
}

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

  // As the gradient's, which needs more: cut alike, a loss has the same bits with its gradient and without.
  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return gradient_bytes_per_column<T>(p);
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
  void rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box, PowerSum& total) {
    const int64_t margin = box.begin[2] - planes_.labels.box.begin[2];
    pool_.aim(d, h, count, /*anchors=*/false);
    const Int* own[kRegionStrip];
    for (int64_t i = 0; i < count; ++i) own[i] = planes_.labels.at(d + i, h, box.begin[2]);
    for (int64_t x = 0; x < box.extent(2); x += S::lanes) {
      merged_.pool(pool_, margin + x);
      M labels[kRegionStrip];
      V scale[kRegionStrip];
      Prefetch ahead[kRegionStrip];
      for (int64_t i = 0; i < count; ++i) {
        if (out_.counts()) S::store(out_.agreement(i) + x, pool_.agreement(i, margin + x));
        labels[i] = S::load(own[i] + x);
        scale[i] = merged_.scale(i, labels[i]);
        ahead[i] = Prefetch::logits(p_, n, d + p_.radius[0] + strip_ + i, h, box.begin[2] + x);
      }
      losses(count, x, labels, scale, ahead);
    }
    for (int64_t i = 0; i < count; ++i) out_.write(i, n, d + i, h, box, 0, own[i], /*with_lse=*/true, total);
  }

  // Losses of the merged tile, and State's `lse`.
  DYNPLAN_INLINE void losses(int64_t count, int64_t x, const M* own, const V* scale, const Prefetch* ahead) {
    const ClassWeights<T>& weights = out_.weights();
    const MergedLosses<T> merged(
        pool_, merged_, p_.classes, count, own,
        scale, [&](int64_t i, int64_t c, V) __attribute__((always_inline)) { ahead[i](c); });
    for (int64_t i = 0; i < count; ++i) {
      V loss = merged.loss[i];
      if (weights.weight || weights.soft > 0) loss = weights.hard * weights.of(own[i]) * loss;
      if (weights.soft > 0) loss += weights.soft * soft(i, own[i], scale[i], merged);
      S::store(out_.losses(i) + x, S::masked(own[i] >= 0, loss));
      S::store(out_.lse(i) + x, S::masked(own[i] >= 0, merged.gap[i]));
    }
  }

  // Sum over classes of weight (lse - z).
  V soft(int64_t i, M own, V scale, const MergedLosses<T>& merged) const {
    V sum{};
    for (int64_t c = 0; c < p_.classes; ++c) {
      const V z = own == static_cast<Int>(c) ? merged.label_sum[i] : merged_.at(c, i);
      // logsumexp - z, by way of the loss: exactly 0 where there is one class, and never below.
      sum += out_.weights().at(c) * S::at_least(merged.loss[i] + (merged.label_sum[i] - z) * scale, 0);
    }
    return sum;
  }

  const RegionCrossEntropyParams& p_;
  int64_t strip_;
  LossRows<T> out_;
  Planes<T> planes_;
  Pool<T> pool_;
  MergedTile<T> merged_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
