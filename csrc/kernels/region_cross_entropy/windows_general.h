// The inner loop: sums over windows, sum over taps of w(p,q) [y_p = y_q] value_p, for a tile of centres and
// all classes. The forward takes them over logits; the backward, windows and agreement being symmetric, over
// gradients.
//
// w depends on the ring max |offset| alone, so a window of one label is a sum of nested boxes,
// w = sum over e of (w_e - w_{e+1}) box_e. A row of values is turned into what it adds to centres 0, 1, ... r
// rows away, by horizontal sums that all of them share, while the sums of the strip stay in registers. Where
// windows hold several labels, the same is done for each label of the tile's centres, over its own pixels.
// Weights that are not of that form (axes of different radii or spacings), and tiles of many labels, take
// every tap.
#pragma once

#include "kernels/region_cross_entropy/tile.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Where the sums of a tile go: class c of row i to row[i] + c * class_stride. Rows of the tile that do not
// exist repeat one that does.
template <class T>
struct TileOutput {
  T* row[kRegionStrip];
  int64_t class_stride;
};

template <class T>
class GeneralWindows : public TileWindows<T> {
  using Base = TileWindows<T>;
  using Base::agree_, Base::count_, Base::extra_, Base::first_extra_, Base::kLanes, Base::kind_,
      Base::num_groups_, Base::num_passes_, Base::passes_, Base::p_, Base::ring_, Base::rows_, Base::strip_,
      Base::values_;
  using typename Base::Kind;
  using typename Base::Pass;

 public:
  using typename Base::Int;
  using typename Base::M;
  using typename Base::Mask;
  using typename Base::S;
  using typename Base::V;
  // Whether gradients are gathered with factors of their own, and whether values have to be finite where
  // pixels do not count.
  static constexpr bool kShares = false, kFinite = false;

  static GeneralWindows gathering(const RegionCrossEntropyParams& params, const Ring<Int>& labels,
                                  const Ring<T>& values, const Ring<T>&, int64_t classes) {
    return GeneralWindows(params, labels, values, classes);
  }

  GeneralWindows(const RegionCrossEntropyParams& params, const Ring<Int>& labels, const Ring<T>& values,
                 int64_t classes)
      : Base(params, labels, values), classes_(classes), by_count_(p_.normalize == RegionNormalize::count) {
    const int r = p_.radius[2];
    const bool flat = p_.size[1] == 1 && p_.radius[1] == 0;
    for (int e = 0; e <= r; ++e) {
      step_[e] = static_cast<T>(p_.axis_weight[2][e] - (e < r ? p_.axis_weight[2][e + 1] : 0));
      total_step_[e] = by_count_ ? T(e == r) : step_[e];
      whole_ += total_step_[e] * static_cast<T>(flat ? (2 * e + 1) * (2 * e + 1) : std::pow(2 * e + 1, 3));
    }
  }

  // Sums of the tile of centres in the ring's columns [column, column + kLanes). Writes whole vectors.
  // `totals`, if not null, gets the normaliser of each row.
  void run(int64_t column, const TileOutput<T>& out, V* totals) {
    this->plan(column);
    if (kind_ == Kind::taps) return add_taps(column, out, totals);
    const Source from{values_.data + column, values_.class_stride, classes_, step_};
    if (kind_ == Kind::plain)
      add_windows<Take::all>(from, out);
    else
      add_windows<Take::labels>(from, out);
    if (!totals) return;
    if (kind_ == Kind::plain) {
      for (int64_t i = 0; i < kRegionStrip; ++i) totals[i] = S::fill(whole_);
    } else {
      alignas(64) T rows[kRegionStrip * kLanes] = {};
      TileOutput<T> to{{}, 0};
      for (int64_t i = 0; i < kRegionStrip; ++i) to.row[i] = rows + i * kLanes;
      add_windows<Take::ones>({from.values, 0, 1, total_step_}, to);
      std::memcpy(totals, rows, sizeof rows);
    }
  }

 private:
  enum class Take { all, labels, ones };  // all pixels' values; those of some labels; their number

  struct Source {
    const T* values;  // of class 0, at the tile's first column
    int64_t class_stride, classes;
    const T* step;
  };

  template <Take kTake>
  void add_windows(const Source& from, const TileOutput<T>& out) const {
    switch (p_.radius[2]) {
      case 0:
        return add_windows<kTake, 0>(from, out);
      case 1:
        return add_windows<kTake, 1>(from, out);
      case 2:
        return add_windows<kTake, 2>(from, out);
      case 3:
        return add_windows<kTake, 3>(from, out);
      case 4:
        return add_windows<kTake, 4>(from, out);
      case 5:
        return add_windows<kTake, 5>(from, out);
      case 6:
        return add_windows<kTake, 6>(from, out);
      case 7:
        return add_windows<kTake, 7>(from, out);
    }
  }

  template <Take kTake, int kRadius>
  void add_windows(const Source& from, const TileOutput<T>& out) const {
    // Large windows reach most rows of a tile from any centre.
    constexpr bool kCut = kTake == Take::labels && kRadius <= 3;
    const int num_passes = kTake == Take::all ? 1 : num_passes_;
    for (int l = 0; l < num_passes; ++l) {
      const Pass& pass = passes_[l];
      const int64_t begin = kCut && this->flat() ? pass.begin : 0;
      if (strip_ == 1)
        add_pass<kTake, Shape<kRadius, 1, 0, false>>(from, out, pass, begin);
      else if (!this->flat())
        add_pass<kTake, Shape<kRadius, kRegionStrip, kRadius, false>>(from, out, pass, begin);
      else if (kCut && pass.end - begin == 1)
        add_pass<kTake, Shape<kRadius, kCut ? 1 : kRegionStrip, kRadius, true>>(from, out, pass, begin);
      else if (kCut && pass.end - begin == 2)
        add_pass<kTake, Shape<kRadius, kCut ? 2 : kRegionStrip, kRadius, true>>(from, out, pass, begin);
      else if (kCut && pass.end - begin == 3)
        add_pass<kTake, Shape<kRadius, kCut ? 3 : kRegionStrip, kRadius, true>>(from, out, pass, begin);
      else
        add_pass<kTake, Shape<kRadius, kRegionStrip, kRadius, true>>(from, out, pass, begin);
    }
  }

  // Centres in kRows rows of a strip, with kReach rows to their either side in a group. kFlat: there is one
  // group, of ring 0.
  template <int kR, int kN, int kS, bool kF>
  struct Shape {
    static constexpr int kRadius = kR, kRows = kN, kReach = kS;
    static constexpr bool kFlat = kF;
  };

  // The sums of a pass, whose centres begin with row `first` of the strip.
  template <Take kTake, class Shape>
  void add_pass(const Source& from, const TileOutput<T>& out, const Pass& pass, int64_t first) const {
    // Where there are registers for it, classes share the loads of masks.
    constexpr int kTogether = kTake == Take::labels && kVectorMasks ? 3 : 1;
    const int64_t together = from.classes / kTogether * kTogether;
    add_classes<kTake, Shape, kTogether>(from, out, pass, first, 0, together);
    if constexpr (kTogether > 1) add_classes<kTake, Shape, 1>(from, out, pass, first, together, from.classes);
  }

  template <Take kTake, class Shape, int kClasses>
  DYNPLAN_INLINE void add_classes(const Source& from, const TileOutput<T>& out, const Pass& pass,
                                  int64_t first, int64_t begin, int64_t end) const {
    constexpr int kRadius = Shape::kRadius, kRows = Shape::kRows, kReach = Shape::kReach;
    constexpr int kHeight = kRows + 2 * kReach;
    V steps[kRadius + 1];
    for (int e = 0; e <= kRadius; ++e) steps[e] = S::fill(from.step[e]);
    const int64_t groups = Shape::kFlat ? 1 : num_groups_;
    // Local, so that they stay in registers.
    const Mask* const first_mask = pass.masks.get() + first * (2 * kRadius + 1) + kRadius;
    const typename Base::Row* const first_row = rows_.get() + first;
    const int64_t class_stride = from.class_stride;
    const T* values = from.values + begin * class_stride;
    for (int64_t c = begin; c < end; c += kClasses, values += kClasses * class_stride) {
      V sums[kClasses][kRows]{};
      for (int64_t group = 0; group < groups; ++group) {
        const int ring = Shape::kFlat ? 0 : ring_[group];
        const typename Base::Row* rows = first_row + group * kHeight;
        const Mask* group_masks = first_mask + group * (kHeight * (2 * kRadius + 1));
        // Loads of masks stay in this loop: GCC would copy them all to the stack before it.
        if constexpr (kTake == Take::labels) asm("" : "+r"(group_masks));
#pragma GCC unroll 32
        for (int j = 0; j < kHeight; ++j) {
          const int64_t row_at = rows[j].value;
          const Mask* masks = group_masks + j * (2 * kRadius + 1);
#pragma GCC unroll 3
          for (int k = 0; k < kClasses; ++k) {
            const T* at = values + k * class_stride + row_at;
            const auto value = [&](int x) __attribute__((always_inline)) {
              if constexpr (kTake == Take::all) return S::load(at + x);
              if constexpr (kTake == Take::ones) return S::masked(masks[x], S::fill(1));
              if constexpr (kTake == Take::labels) return S::load_masked(at + x, masks[x]);
            };
            const auto both = [&](int x) __attribute__((always_inline)) {
              return value(-x) + value(x);
            };
            V share[kRadius + 1];
            row_shares<S, kRadius>(steps, value(0), both, share);
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
              const int distance = i + kReach < j ? j - i - kReach : i + kReach - j;
              if (distance <= kRadius) sums[k][i] += share[Shape::kFlat || distance > ring ? distance : ring];
            }
          }
        }
      }
#pragma GCC unroll 3
      for (int k = 0; k < kClasses; ++k) {
        // Backwards, so that a row that exists is written after those that repeat it.
#pragma GCC unroll 4
        for (int i = kRows - 1; i >= 0; --i) {
          T* to = out.row[first + i] + (c + k) * out.class_stride;
          if constexpr (kTake == Take::all)
            S::store(to, sums[k][i]);
          else
            S::store(to, S::masked(pass.taken[first + i], S::load(to)) +
                             S::masked(pass.mine[first + i], sums[k][i]));
        }
      }
    }
  }

  // Eight classes at once share each load of a weight and of a mask.
  void add_taps(int64_t column, const TileOutput<T>& out, V* totals) const {
    constexpr int kClasses = 8;
    const T* values = values_.data + column;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t begin = first_extra_[i], end = first_extra_[i + 1];
      int64_t c = 0;
      for (; c + kClasses <= classes_; c += kClasses) add_taps<kClasses>(values, out, i, c, begin, end);
      for (; c < classes_; ++c) add_taps<1>(values, out, i, c, begin, end);
      if (!totals) continue;
      totals[i] = V{};
      for (int64_t t = begin; t < end; ++t)
        totals[i] += S::masked(agree_[t], S::fill(by_count_ ? T(1) : extra_[t].weight));
    }
  }

  template <int kClasses>
  void add_taps(const T* values, const TileOutput<T>& out, int64_t i, int64_t c, int64_t begin,
                int64_t end) const {
    V sums[kClasses]{};
    for (int64_t t = begin; t < end; ++t) {
      const T* from = values + extra_[t].value + c * values_.class_stride;
      const V weight = S::fill(extra_[t].weight);
#pragma GCC unroll 8
      for (int k = 0; k < kClasses; ++k)
        sums[k] += weight * S::masked(agree_[t], S::load(from + k * values_.class_stride));
    }
#pragma GCC unroll 8
    for (int k = 0; k < kClasses; ++k) S::store(out.row[i] + (c + k) * out.class_stride, sums[k]);
  }

  const int64_t classes_;
  const bool by_count_;
  T step_[kRegionMaxRadius + 1] = {}, total_step_[kRegionMaxRadius + 1] = {};
  T whole_ = 0;  // the normaliser of a window of one label
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
