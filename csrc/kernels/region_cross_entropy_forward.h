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

  explicit MergedTile(int64_t classes) : sums(memory.zeroed(classes * kClassStride)) {}

  void pool(Pool<T>& pool, int64_t column) {
    TileOutput<T> out{{}, kClassStride};
    for (int64_t i = 0; i < kRegionStrip; ++i) out.row[i] = sums + i * S::lanes;
    pool.run(column, out, totals);
  }
  T* address(int64_t c, int64_t i) const { return sums + c * kClassStride + i * S::lanes; }
  typename S::V at(int64_t c, int64_t i) const { return S::load(address(c, i)); }

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

// Cross-entropy of a vector of merged vectors, before class weights.
template <class T>
struct MergedLoss {
  using S = Simd<T>;
  using V = typename S::V;
  V loss, logsumexp;
  V mass;  // sum over classes of exp((z - top) scale)

  // Row i of the tile that `pool` planned and `merged` holds. `each(c, term)` gets the terms of `mass`.
  template <class Each>
  DYNPLAN_INLINE MergedLoss(const Pool<T>& pool, const MergedTile<T>& merged, int64_t i, typename S::M own,
                            V top, V scale, Each each) {
    // The label's own term is left out of the sum, so that the small losses of pixels that are clearly right
    // keep their digits. Differences are taken before scaling: a fused multiply-add of the product would not
    // give exactly 0 for the largest.
    V others{}, label_sum{};
    pool.for_classes([&](int64_t c, auto owned) __attribute__((always_inline)) {
      const V sum = merged.at(c, i), term = S::exp((sum - top) * scale);
      each(c, term);
      if constexpr (owned) {
        const typename S::M hit = own == static_cast<typename S::Int>(c);
        others += S::unmasked(hit, term);
        label_sum = hit ? sum : label_sum;
      } else {
        others += term;
      }
    });
    const V label_term = S::exp((label_sum - top) * scale), gap = S::log1p(others + (label_term - T(1)));
    mass = others + label_term;
    logsumexp = top * scale + gap;
    loss = (top - label_sum) * scale + gap;
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
  // before the box; their logsumexps too where `with_lse`. `labels` begin with the box.
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
      V top[kRegionStrip];
      merged_.tops(p_.classes, top);
      for (int64_t i = 0; i < count; ++i) {
        if (out_.counts()) S::store(out_.agreement(i) + x, pool_.agreement(i, margin + x));
        vector(S::load(own[i] + x), i, top[i], out_.losses(i) + x, out_.lse(i) + x,
               Prefetch::logits(p_, n, d + p_.radius[0] + strip_ + i, h, box.begin[2] + x));
      }
    }
    for (int64_t i = 0; i < count; ++i) out_.write(i, n, d + i, h, box, 0, own[i], /*with_lse=*/true, total);
  }

  // Loss and logsumexp of row i of the merged tile, whose largest sums are `top`.
  DYNPLAN_INLINE void vector(M own, int64_t i, V top, T* losses, T* lse, const Prefetch& next) {
    const ClassWeights<T>& weights = out_.weights();
    const V scale = merged_.scale(i, own);
    const MergedLoss<T> merged(
        pool_, merged_, i, own, top, scale, [&](int64_t c, V) __attribute__((always_inline)) { next(c); });
    V loss = merged.loss;
    if (weights.weight || weights.soft > 0) {
      loss = weights.hard * weights.of(own) * loss;
      V soft{};
      for (int64_t c = 0; weights.soft > 0 && c < p_.classes; ++c)
        soft += weights.at(c) * (merged.logsumexp - merged_.at(c, i) * scale);
      loss += weights.soft * soft;
    }
    S::store(losses, S::masked(own >= 0, loss));
    S::store(lse, S::masked(own >= 0, merged.logsumexp));
  }

  const RegionCrossEntropyParams& p_;
  int64_t strip_;
  LossRows<T> out_;
  Planes<T> planes_;
  Pool<T> pool_;
  MergedTile<T> merged_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
