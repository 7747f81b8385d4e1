// The inner loop for windows of 3 x 3 on images of which every pixel is a centre: the sums of
// windows_general.h, of one vector of the widest kind in each row of a strip. Every pixel of a window, a tap,
// gets a vector of weights, 0 in the lanes of which it does not agree. Weights are made from the labels once
// for all classes and stay in registers, so that sums cost the same wherever labels end.
//
// Every lane of every tap is multiplied: values have to be finite where pixels do not count.
#pragma once

#include "kernels/region_cross_entropy/windows_general.h"

namespace dynplan::kernels::DYNPLAN_ISA {

inline bool takes_small_windows(const RegionCrossEntropyParams& p) {
  return is_stepless_image(p) && p.radius[0] == 1 && p.radius[2] == 1 && p.merge == RegionMerge::logits;
}

template <class T>
class SmallWindows {
 public:
  using S = Simd<T, kWideBytes>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;
  static constexpr bool kShares = true, kFinite = true;

  static int64_t strip(const RegionCrossEntropyParams&) { return kRegionStrip; }

  // `shares`, if not null, are factors of the values of all classes, in a ring of the values' columns.
  SmallWindows(const RegionCrossEntropyParams& p, const Ring<Int>& labels, const Ring<T>& values,
               int64_t classes, const Ring<T>* shares = nullptr)
      : last_row_(p.size[0] - 1), labels_(labels), values_(values), shares_(shares), classes_(classes) {
    for (int tap = 0; tap < kTaps; ++tap) {
      const double down = p.axis_weight[0][tap / 3 != 1], across = p.axis_weight[2][tap % 3 != 1];
      weight_[tap] = static_cast<T>(down < across ? down : across);
      part_[tap] = p.normalize == RegionNormalize::count ? T(1) : weight_[tap];
    }
  }

  static SmallWindows gathering(const RegionCrossEntropyParams& p, const Ring<Int>& labels,
                                const Ring<T>& values, const Ring<T>& shares, int64_t classes) {
    return SmallWindows(p, labels, values, classes, &shares);
  }

  // As GeneralWindows'. Rows outside the image agree with none, but are multiplied: the nearest stands for
  // them.
  void aim(int64_t d, int64_t h, int64_t count, bool /*anchors*/) {
    count_ = count;
    for (int64_t j = 0; j < count + 2; ++j) {
      const int64_t row = d + j - 1, inside = larger(0, smaller(last_row_, row));
      label_row_[j] = labels_.at(row, h, labels_.box.begin[2]);
      value_row_[j] = values_.at(inside, h, values_.box.begin[2]);
      if (shares_) share_row_[j] = shares_->at(inside, h, shares_->box.begin[2]);
    }
  }

  V agreement(int64_t i, int64_t column) const {
    const M own = S::load(label_row_[i + 1] + column);
    V sum{};
    for (int tap = 0; tap < kTaps; ++tap)
      sum += S::masked((label(i + tap / 3, column + tap % 3) == own) & (own >= 0), S::fill(1));
    return sum;
  }

  void run(int64_t column, const TileOutput<T>& out, V* totals) {
    if (shares_)
      strip<true>(column, out, totals);
    else
      strip<false>(column, out, totals);
  }

 private:
  static constexpr int kTaps = 9;
  static constexpr int kRows =
      kVectorMasks ? 2 : 1;  // that share what is loaded: registers for their weights

  // Of a row counted from the one above the strip, and of a column from the one before the tile.
  DYNPLAN_INLINE M label(int64_t row, int64_t column) const { return S::load(label_row_[row] + column - 1); }

  template <bool kGather>
  void strip(int64_t column, const TileOutput<T>& out, V* totals) {
    int64_t i = 0;
    for (; i + kRows <= count_; i += kRows) rows<kGather, kRows>(i, column, out, totals);
    for (; i < count_; ++i) rows<kGather, 1>(i, column, out, totals);
  }

  template <bool kGather, int kHeight>
  void rows(int64_t first, int64_t column, const TileOutput<T>& out, V* totals) {
    V weight[kHeight][kTaps], total[kHeight]{};
    M own[kHeight];
    for (int i = 0; i < kHeight; ++i) {
      own[i] = S::load(label_row_[first + i + 1] + column);
      own[i] = own[i] >= 0 ? own[i] : S::fill_int(-2);  // agrees with none
    }
    for (int j = 0; j < kHeight + 2; ++j)
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        const M there = label(first + j, column + x);
        const V share = kGather ? S::load(share_row_[first + j] + column + x - 1) : S::fill(1);
#pragma GCC unroll 2
        for (int i = 0; i < kHeight; ++i) {
          if (j < i || j > i + 2) continue;
          const int tap = (j - i) * 3 + x;
          const M agrees = there == own[i];
          weight[i][tap] = agrees ? share * weight_[tap] : V{};
          if constexpr (!kGather) total[i] += agrees ? S::fill(part_[tap]) : V{};
        }
      }
    for (int i = 0; !kGather && i < kHeight; ++i) totals[first + i] = total[i];
    for (int64_t c = 0; c < classes_; ++c) sums<kHeight>(weight, first, column, c, out);
  }

  template <int kHeight>
  DYNPLAN_INLINE void sums(const V (&weight)[kHeight][kTaps], int64_t first, int64_t column, int64_t c,
                           const TileOutput<T>& out) const {
    // Additions wait for one another where no other row's are under way.
    constexpr int kParts = kRows == 1 ? 2 : 1;
    V sum[kHeight][kParts]{};
#pragma GCC unroll 4
    for (int j = 0; j < kHeight + 2; ++j) {
      V value[3];
      S::load_around(value_row_[first + j] + c * values_.class_stride + column, value);
#pragma GCC unroll 2
      for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 3
        for (int x = 0; x < 3; ++x) {
          if (j < i || j > i + 2) continue;
          sum[i][(j - i) % kParts] += weight[i][(j - i) * 3 + x] * value[x];
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kHeight; ++i) {
      if constexpr (kParts == 2) sum[i][0] += sum[i][1];
      S::store(out.row[first + i] + c * out.class_stride, sum[i][0]);
    }
  }

  const int64_t last_row_;
  const Ring<Int>& labels_;
  const Ring<T>& values_;
  const Ring<T>* const shares_;
  const int64_t classes_;
  int64_t count_ = 0;
  // Of the rows that windows reach, from the one above the strip.
  const Int* label_row_[kRegionStrip + 2] = {};
  const T* value_row_[kRegionStrip + 2] = {};
  const T* share_row_[kRegionStrip + 2] = {};
  T weight_[kTaps], part_[kTaps];  // of a tap, and of the normaliser
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
