// The windows of a block of centres: which rows, columns and pixels they take. Made from labels once, for the
// sums of all classes (region_cross_entropy_pool.h).
#pragma once

#include "kernels/region_cross_entropy_window.h"

namespace dynplan::kernels::DYNPLAN_ISA {

inline constexpr int64_t kRegionStrip = 4;     // rows of centres handled at once, in images without stride
inline constexpr int64_t kRegionSegment = 96;  // columns of centres handled at once

template <class T>
class BlockWindows {
 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;
  static constexpr int kLanes = S::lanes;

  // Rows of centres to a block.
  static int64_t strip(const RegionCrossEntropyParams& p) {
    return p.size[1] == 1 && p.radius[1] == 0 && p.stride[0] == 1 && p.radius[0] <= 3 ? kRegionStrip : 1;
  }

  // Centres are in the `count` rows (d + i, h); values, with `anchors`, only in rows that hold anchors.
  void aim(int64_t d, int64_t h, int64_t count, bool anchors) {
    count_ = count;
    const int* r = p_.radius;
    for (int64_t i = 0; i < count; ++i) {
      own_[i] = labels_.at(d + i, h, labels_.box.begin[2]);
      aim_taps(i, d + i, h, anchors);
    }
    if (!nested_) return;
    if (strip_ > 1) {
      for (int64_t i = 0; i < strip_ + 2 * r[0]; ++i) rows_[i] = row_at(d + i - r[0], h);
      return;
    }
    int64_t rows = 0;
    for (int ring = 0; ring <= r[2]; ++ring) {
      first_row_[ring] = rows;
      for_rows(d, h, anchors, [&](int64_t z, int64_t y) {
        if (larger(std::abs(z - d), std::abs(y - h)) == ring) rows_[rows++] = row_at(z, y);
      });
    }
    first_row_[r[2] + 1] = rows;
  }

  // Number of agreeing pixels of a vector of centres in row i.
  V agreement(int64_t i, int64_t column) {
    const M own = S::load(own_[i] + column);
    V total{};
    for (int64_t t = 0; t < tap_count_[i]; ++t)
      total += S::masked(S::load(labels_.data + column + taps_[i][t].label) == own, S::fill(1));
    return S::masked(own >= 0, total);
  }

 protected:
  static constexpr int kVectors = kRegionStrip * kRegionSegment / kLanes;

  struct Row {
    int64_t label, value;  // offsets in the rings, to be added to a column
  };
  struct Tap {
    int64_t label, value;
    T weight;
  };
  // A vector of centres that does not take all columns: its place in its row, and its taps.
  struct Cut {
    int64_t x, first, last;
  };

  // `labels` holds classes, or -1. Both rings start at one column.
  BlockWindows(const RegionCrossEntropyParams& params, const Ring<Int>& labels, const Ring<T>& values)
      : p_(params), labels_(labels), values_(values), strip_(strip(params)) {
    const int r = p_.radius[2];
    const int64_t rows = (2 * p_.radius[0] + 1) * (2 * p_.radius[1] + 1), taps = rows * (2 * r + 1);
    for (int64_t i = 0; i < strip_; ++i) taps_[i].reset(new Tap[taps]);
    rows_.reset(new Row[larger(rows, strip_ + 2 * p_.radius[0])]);
    const int64_t vectors = strip_ * kRegionSegment / kLanes;
    sides_.reset(new M[vectors * (2 * r + 1)]);
    agree_.reset(new M[vectors * taps]);
    extra_.reset(new Tap[vectors * taps]);
    for (int axis = 0; axis < 2; ++axis) {
      if (axis == 1 && p_.size[1] == 1 && p_.radius[1] == 0) continue;
      nested_ = nested_ && p_.radius[axis] == r;
      for (int i = 0; nested_ && i <= r; ++i) nested_ = p_.axis_weight[axis][i] == p_.axis_weight[2][i];
    }
  }

  // Sorts a block's vectors of centres into those that take all columns, and the others.
  void plan(int64_t column, int64_t count) {
    const int r = p_.radius[2];
    int full = 0, cuts = 0;
    extra_count_ = 0;
    for (int64_t i = 0; i < count_; ++i) {
      for (int64_t x = 0; x < count; x += kLanes) {
        const M own = S::load(own_[i] + column + x), valid = own >= 0;
        M* sides = sides_.get() + cuts * (2 * r + 1);
        M all = valid;
        for (int k = 0; k <= 2 * r; ++k) {
          sides[k] = (S::load(own_[i] + column + x + k - r) == own) & valid;
          all &= sides[k];
        }
        if (nested_ && S::all(all)) {
          full_[full++] = static_cast<int16_t>(x);
          continue;
        }
        cuts_[cuts].x = x;
        cuts_[cuts].first = extra_count_;
        find_taps(i, column + x, own < 0 ? S::fill_int(-2) : own, sides);
        cuts_[cuts++].last = extra_count_;
      }
      full_end_[i] = full;
      cut_end_[i] = cuts;
    }
  }

  template <class F>
  void for_taps(F f) const {
    int i = 0;
    for (int64_t row = 0; row < count_; ++row)
      for (; i < cut_end_[row]; ++i)
        if (cuts_[i].first < cuts_[i].last) f(cuts_[i], row);
  }

  const RegionCrossEntropyParams& p_;
  const Ring<Int>& labels_;
  const Ring<T>& values_;
  const int64_t strip_;
  bool nested_ = true;                 // all axes have one radius and one set of weights
  int64_t count_ = 0;                  // rows of centres,
  const Int* own_[kRegionStrip] = {};  // and their labels
  // Of a strip: in order. Otherwise by ring: those of ring e are [first_row_[e], first_row_[e + 1]).
  std::unique_ptr<Row[]> rows_;
  int64_t first_row_[kRegionMaxRadius + 2] = {};
  // Vectors of centres, row after row: those of row i end at full_end_[i] and cut_end_[i].
  int full_end_[kRegionStrip], cut_end_[kRegionStrip];
  int16_t full_[kVectors];
  Cut cuts_[kVectors];
  std::unique_ptr<M[]> sides_, agree_;  // which lanes of a cut vector take a column, or a tap of extra_
  std::unique_ptr<Tap[]> extra_;

 private:
  // The taps of a vector of centres that it does not take with its columns: only columns that some lanes do
  // not take have any. (Kept without branches: most are few and far between.)
  void find_taps(int64_t i, int64_t column, M own, const M* sides) {
    const Int* labels = labels_.data + column;
    const int64_t width = 2 * p_.radius[2] + 1;
    int64_t extra = extra_count_;
    for (int64_t k = 0; k < width; ++k) {
      const M taken = nested_ ? sides[k] : M{};
      if (S::all(taken | (own < 0))) continue;
      for (int64_t t = k; t < tap_count_[i]; t += width) {
        const Tap& tap = taps_[i][t];
        const M missed = (S::load(labels + tap.label) == own) & ~taken;
        agree_[extra] = missed;
        extra_[extra] = tap;
        extra += S::bits(missed) != 0;
      }
    }
    extra_count_ = extra;
  }

  Row row_at(int64_t z, int64_t y) const {
    return {labels_.offset(z, y, labels_.box.begin[2]), values_.offset(z, y, values_.box.begin[2])};
  }

  // Rows of the image in the window of row (d, h).
  template <class F>
  void for_rows(int64_t d, int64_t h, bool anchors, F f) const {
    const int* r = p_.radius;
    for (int64_t z = larger(0, d - r[0]); z <= smaller(p_.size[0] - 1, d + r[0]); ++z) {
      if (anchors && z % p_.stride[0] != 0) continue;
      for (int64_t y = larger(0, h - r[1]); y <= smaller(p_.size[1] - 1, h + r[1]); ++y)
        if (!anchors || y % p_.stride[1] == 0) f(z, y);
    }
  }

  void aim_taps(int64_t i, int64_t d, int64_t h, bool anchors) {
    int64_t taps = 0;
    for_rows(d, h, anchors, [&](int64_t z, int64_t y) {
      const Row row = row_at(z, y);
      const int r = p_.radius[2];
      const double rows = least(p_.axis_weight[0][std::abs(z - d)], p_.axis_weight[1][std::abs(y - h)]);
      for (int x = -r; x <= r; ++x)
        taps_[i][taps++] = {row.label + x, row.value + x,
                            static_cast<T>(least(rows, p_.axis_weight[2][std::abs(x)]))};
    });
    tap_count_[i] = taps;
  }

  static double least(double a, double b) { return a < b ? a : b; }

  std::unique_ptr<Tap[]> taps_[kRegionStrip];  // all of a row's windows
  int64_t tap_count_[kRegionStrip] = {};
  int64_t extra_count_ = 0;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
