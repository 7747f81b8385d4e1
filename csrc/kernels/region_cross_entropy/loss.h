// Losses of anchors, and the forward: (losses, lse) per anchor, agreement, and the sums of the Minkowski
// mean. Logits are read once (plus halos); nothing else of their size is written.
#pragma once

#include "kernels/region_cross_entropy/anchors.h"
#include "kernels/region_cross_entropy/march.h"
#include "kernels/region_cross_entropy/windows_small.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Labels of a tile's anchors. S, here and below: Simd of the width of the tile.
template <class S>
class TileLabels {
 public:
  TileLabels(const typename S::M* own, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      typename S::M rest = own[i];
      for (int l = 0; l < num_; ++l) rest |= rest == label_[l];
      while (const unsigned left = S::bits(rest >= 0)) {
        if (num_ == kMost) {
          num_ = -1;
          return;
        }
        label_[num_] = rest[std::countr_zero(left)];
        rest |= rest == label_[num_++];
      }
    }
  }

  // For the anchors `own`, a row of the tile: by_class(c) for classes that are among all rows' labels, if
  // those are few, or by_lane(lane, c) for each anchor that has a label.
  template <class ByClass, class ByLane>
  DYNPLAN_INLINE void for_each(typename S::M own, ByClass by_class, ByLane by_lane) const {
    for (int l = 0; l < num_; ++l) by_class(static_cast<int64_t>(label_[l]));
    if (num_ >= 0) return;
    alignas(64) typename S::Int label[S::lanes];
    S::store(label, own);
    for (int lane = 0; lane < S::lanes; ++lane)
      if (label[lane] >= 0) by_lane(lane, static_cast<int64_t>(label[lane]));
  }

 private:
  static constexpr int kMost = 4;
  int num_ = 0;  // -1: more than kMost
  typename S::Int label_[kMost];
};

// The sums of every class of one tile, and their normalisers: of class c, row i at
// sums + c * kClassStride + i * S::lanes.
template <class S>
struct MergedTile {
  using T = typename S::T;
  static constexpr int64_t kClassStride = kRegionStrip * S::lanes;
  Scratch<T> memory;
  T* sums;
  typename S::V totals[kRegionStrip] = {};

  explicit MergedTile(int64_t classes) : sums(memory.get(classes * kClassStride)) {}

  template <class Windows>
  void pool(Windows& pool, int64_t column) {
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

// A tile of anchors whose merged vectors are known, where their numbers are, and where their gradients go.
template <class S>
struct AnchorTile {
  using T = typename S::T;
  int64_t count;  // rows of the strip
  typename S::M own[kRegionStrip];
  typename S::V scale[kRegionStrip];  // 1 / Z
  T* losses[kRegionStrip];            // written; a backward of its own reads slopes there
  T* lse[kRegionStrip];
  T* out[kRegionStrip];
  int64_t class_stride;
  T* share[kRegionStrip] = {};  // what gradients have yet to be multiplied by, unless null
  PrefetchAhead& ahead;         // what will be used later

  explicit AnchorTile(PrefetchAhead& later) : ahead(later) {}

  DYNPLAN_INLINE void prefetch(int64_t i, int64_t c) const {
    constexpr bool kBoth = sizeof(typename S::V) == 64;  // narrower ones share a line of each
    ahead.template prefetch_next<kBoth>(i + c);
  }
};

// Cross-entropies of the merged vectors of a tile, row by row, before class weights.
template <class S>
struct MergedLosses {
  using T = typename S::T;
  using V = typename S::V;
  using M = typename S::M;
  V loss[kRegionStrip];
  V log_mass[kRegionStrip];    // logsumexp less the largest
  V others[kRegionStrip];      // mass less label_term, exactly
  V mass[kRegionStrip];        // sum over classes of exp((z - top) scale)
  V label_term[kRegionStrip];  // the label's own term of it
  V label_sum[kRegionStrip];

  // Of the tile that `merged` holds, which loses the sums of labels. `each(i, c, term)` gets the terms of
  // `mass`, with 0 for the label's own.
  template <class Each>
  DYNPLAN_INLINE MergedLosses(const MergedTile<S>& merged, const TileLabels<S>& labels, int64_t classes,
                              const AnchorTile<S>& at, Each each) {
    const int64_t count = at.count;
    const M* own = at.own;
    const V* scale = at.scale;
    V top[kRegionStrip];
    merged.tops(classes, top);
    // The label's own term is left out of the sum, so that the small losses of pixels that are clearly right
    // keep their digits. It is taken out before, so that the loop over classes has no branch. Differences are
    // taken before scaling: a fused multiply-add of the product would not give exactly 0 for the largest.
    for (int64_t i = 0; i < count; ++i) {
      constexpr T kNone = -std::numeric_limits<T>::max();
      V taken{};
      labels.for_each(
          own[i],
          [&](int64_t c) __attribute__((always_inline)) {
            const M hit = own[i] == static_cast<typename S::Int>(c);
            const V sum = merged.at(c, i);
            taken = hit ? sum : taken;
            merged.set(c, i, hit ? S::fill(kNone) : sum);
          },
          [&](int lane, int64_t c) __attribute__((always_inline)) {
            T& sum = merged.address(c, i)[lane];
            taken[lane] = sum;
            sum = kNone;
          });
      label_sum[i] = taken;
    }
    // All rows' sums, then what follows from them: logarithms take long, but not those of several rows.
    for (int64_t i = 0; i < count; ++i) {
      V others{};
      for (int64_t c = 0; c < classes; ++c) {
        const V term = S::exp((merged.at(c, i) - top[i]) * scale[i]);
        each(i, c, term);
        others += term;
      }
      this->others[i] = others;
    }
    for (int64_t i = 0; i < count; ++i) {
      label_term[i] = S::exp((label_sum[i] - top[i]) * scale[i]);
      log_mass[i] = S::log1p(others[i] + (label_term[i] - T(1)));
      mass[i] = others[i] + label_term[i];
      loss[i] = (top[i] - label_sum[i]) * scale[i] + log_mass[i];
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
  // `rows` rows as wide as those of `box`.
  void reset(const Box& box, int64_t rows) { rows_.reset(memory_, box.row(), 3, rows); }

  T* losses(int64_t i) { return rows_.data + i * rows_.plane_stride; }
  T* lse(int64_t i) { return losses(i) + rows_.class_stride; }
  T* agreement(int64_t i) { return lse(i) + rows_.class_stride; }

  // Writes the anchors of row (d, h) of the box, which is the i-th row and has `margin` columns before the
  // box, and adds them to `total`. `labels` begin with the box.
  template <class Int>
  void write(int64_t i, int64_t n, int64_t d, int64_t h, const Box& box, int64_t margin, const Int* labels,
             PowerSum& total) {
    const AnchorRow anchors(p_, n, d, h, box.begin[2], box.end[2]);
    const int64_t from = anchors.first - box.begin[2], column = margin + from;
    T* const written = static_cast<T*>(state_.losses) + anchors.index;
    copy(losses(i) + column, anchors, written);
    if (p_.merge == RegionMerge::logits)  // else it is the pixels'
      copy(lse(i) + column, anchors, static_cast<T*>(state_.lse) + anchors.index);
    if (counts()) copy(agreement(i) + column, anchors, state_.agreement + anchors.index);
    // Loads would wait for what was just written.
    const T* const dense = anchors.step == 1 ? losses(i) + column : written;
    add_row(total, dense, anchors.count, labels + from, anchors.step, weights_);
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

// What is made of the merged vectors of anchors, tile by tile. This part keeps the losses of some rows until
// they are written to State.
template <class T>
class LossAnchors {
 public:
  LossAnchors(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state)
      : p_(params), out_(params, state) {}

  // Rows are as wide as `anchors`.
  void reset(const Box& anchors, int64_t rows) { out_.reset(anchors, rows); }
  // Row (d, h) will be the i-th.
  void begin(int64_t, int64_t, int64_t, int64_t, const Box&) {}
  template <class S>
  void place(int64_t row, int64_t column, AnchorTile<S>& tile, int64_t i) {
    tile.losses[i] = out_.losses(row) + column;
    tile.lse[i] = out_.lse(row) + column;
  }
  bool counts() const { return out_.counts(); }
  T* agreement(int64_t i) { return out_.agreement(i); }

  // Row (d, h) is done. Windows reach over the edges of a box: anchors there are written, and added to
  // `total`, by the box they are in. `labels` begin with the box.
  template <class Int>
  void end(int64_t i, int64_t n, int64_t d, int64_t h, const Box& box, int64_t margin, const Int* labels,
           PowerSum& total) {
    if (box.holds(d, h)) out_.write(i, n, d, h, box, margin, labels, total);
  }

 protected:
  const RegionCrossEntropyParams& p_;
  LossRows<T> out_;
};

// Losses alone.
template <class T>
class ForwardAnchors : public LossAnchors<T> {
  using LossAnchors<T>::p_, LossAnchors<T>::out_;

 public:
  static constexpr bool kGradient = false;

  ForwardAnchors(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
                 const RegionCrossEntropyGrad&)
      : LossAnchors<T>(params, state) {}

  template <class S>
  DYNPLAN_INLINE void tile(const MergedTile<S>& merged, const AnchorTile<S>& at) {
    using V = typename S::V;
    const ClassWeights<T>& weights = out_.weights();
    const TileLabels<S> labels(at.own, at.count);
    const MergedLosses<S> made(
        merged, labels, p_.classes,
        at, [&](int64_t i, int64_t c, V) __attribute__((always_inline)) { at.prefetch(i, c); });
    for (int64_t i = 0; i < at.count; ++i) {
      V loss = made.loss[i];
      if (weights.weight || weights.soft > 0) loss = weights.hard * weights.template of<S>(at.own[i]) * loss;
      if (weights.soft > 0) loss += weights.soft * soft(i, at, merged, made);
      S::store(at.losses[i], S::masked(at.own[i] >= 0, loss));
      S::store(at.lse[i], S::masked(at.own[i] >= 0, made.log_mass[i]));
    }
  }

 private:
  // Sum over classes of weight (lse - z).
  template <class S>
  typename S::V soft(int64_t i, const AnchorTile<S>& at, const MergedTile<S>& merged,
                     const MergedLosses<S>& made) const {
    using V = typename S::V;
    V sum{};
    for (int64_t c = 0; c < p_.classes; ++c) {
      const V z = at.own[i] == static_cast<typename S::Int>(c) ? made.label_sum[i] : merged.at(c, i);
      // logsumexp - z, by way of the loss: exactly 0 where there is one class, and never below.
      sum += out_.weights().at(c) * S::at_least(made.loss[i] + (made.label_sum[i] - z) * at.scale[i], 0);
    }
    return sum;
  }
};

// Of rings of values and of anchors' gradients.
template <class T>
int64_t gradient_bytes_per_column(const RegionCrossEntropyParams& p, int64_t strip) {
  const int64_t planes = 2 * p.radius[0] + strip + planes_between(p, strip);
  return planes * p.classes * static_cast<int64_t>(sizeof(T));
}

// Windows: GeneralWindows or SmallWindows. Values: LogitValues, or ProbabilityValues of probabilities.h.
template <class T, class Windows, class Values>
class RegionForward {
 public:
  using S = typename Windows::S;
  using Int = typename S::Int;

  RegionForward(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
                const RegionCrossEntropyGrad& grad)
      : p_(params),
        strip_(Windows::strip(params)),
        state_(state),
        stage_(params, state, grad),
        planes_(params, Windows::kFinite),
        windows_(params, planes_.labels(), planes_.values(), planes_.channels()),
        merged_(planes_.channels()) {}

  PowerSum run(int64_t n, const Box& box) {
    PowerSum total;
    const int64_t planes = 2 * p_.radius[0] + strip_;
    planes_.reset(box, 1, planes, planes);
    if constexpr (Values::Planes::kReadAgain) planes_.write_lse(box, static_cast<T*>(state_.lse));
    stage_.reset(box, kRegionStrip);
    march_forward(
        p_, box, strip_, strip_ > 1 ? p_.radius[0] : 0, [&](int64_t d) { planes_.load(n, d); },
        [&](int64_t d, int64_t h, int64_t count) { rows(n, d, h, count, box, total); });
    return total;
  }

  const RegionBadLabel& bad() const { return planes_.bad(); }

 private:
  void rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box, PowerSum& total) {
    const int64_t margin = box.begin[2] - planes_.labels().box.begin[2];
    windows_.aim(d, h, count, /*anchors=*/false);
    const Int* own[kRegionStrip];
    for (int64_t i = 0; i < count; ++i) own[i] = planes_.labels().at(d + i, h, box.begin[2]);
    const int64_t next = d + count + p_.radius[0];
    PrefetchAhead ahead{PrefetchRows::logits(p_, n, next, next + strip_, h, box.begin[2] - p_.radius[2],
                                             box.end[2] + p_.radius[2]),
                        {}};
    for (int64_t x = 0; x < box.extent(2); x += S::lanes) {
      merged_.pool(windows_, margin + x);
      AnchorTile<S> tile(ahead);
      tile.count = count;
      for (int64_t i = 0; i < count; ++i) {
        if (stage_.counts()) S::store(stage_.agreement(i) + x, windows_.agreement(i, margin + x));
        tile.own[i] = S::load(own[i] + x);
        tile.scale[i] = merged_.scale(i, tile.own[i]);
        stage_.place(i, x, tile, i);
      }
      stage_.tile(merged_, tile);
    }
    ahead.prefetch_all();
    for (int64_t i = 0; i < count; ++i) stage_.end(i, n, d + i, h, box, 0, own[i], total);
  }

  const RegionCrossEntropyParams& p_;
  int64_t strip_;
  const RegionCrossEntropyState& state_;
  typename Values::Loss stage_;
  typename Values::Planes planes_;
  Windows windows_;
  MergedTile<S> merged_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
