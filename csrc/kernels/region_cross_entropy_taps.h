// The inner loop for windows of 3 x 3 on images: sums as those of region_cross_entropy_pool.h, of one vector
// of the widest kind in each row of a strip. Every pixel of a window, a tap, gets a vector of weights, 0 in
// the lanes of which it does not agree. Weights are made from the labels once for all classes and stay in
// registers, so that sums cost the same wherever labels end. Larger windows have too many taps for that.
//
// Every lane of every tap is multiplied: values have to be finite where pixels do not count.
#pragma once

#include "kernels/region_cross_entropy_pool.h"

namespace dynplan::kernels::DYNPLAN_ISA {

inline bool takes_taps(const RegionCrossEntropyParams& p) {
  const bool stepless = p.stride[0] == 1 && p.stride[1] == 1 && p.stride[2] == 1;
  return stepless && p.size[1] == 1 && p.radius[0] == 1 && p.radius[1] == 0 && p.radius[2] == 1;
}

template <class T>
class Taps {
 public:
  using S = Simd<T, kWideBytes>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;
  static constexpr bool kShares = true;

  static int64_t strip(const RegionCrossEntropyParams&) { return kRegionStrip; }

  // `shares`, if not null, are factors of the values of all classes, in a ring of the values' columns.
  Taps(const RegionCrossEntropyParams& p, const Ring<Int>& labels, const Ring<T>& values, int64_t classes,
       const Ring<T>* shares = nullptr)
      : last_row_(p.size[0] - 1), labels_(labels), values_(values), shares_(shares), classes_(classes) {
    for (int y = 0; y < kAcross; ++y)
      for (int x = 0; x < kAcross; ++x) {
        const double down = p.axis_weight[0][std::abs(y - 1)], across = p.axis_weight[2][std::abs(x - 1)];
        weight_[y][x] = static_cast<T>(down < across ? down : across);
        part_[y][x] = p.normalize == RegionNormalize::count ? T(1) : weight_[y][x];
      }
  }

  static Taps gathering(const RegionCrossEntropyParams& p, const Ring<Int>& labels, const Ring<T>& values,
                        const Ring<T>& shares, int64_t classes) {
    return Taps(p, labels, values, classes, &shares);
  }

  // Centres are in the `count` rows (d + i, h).
  void aim(int64_t d, int64_t h, int64_t count, bool /*anchors*/) {
    count_ = count;
    for (int64_t j = 0; j < count + kAcross - 1; ++j) {
      // Rows outside the image agree with none, but are multiplied too: the nearest stands for them.
      const int64_t row = d + j - 1, inside = larger(0, smaller(last_row_, row));
      label_row_[j] = labels_.at(row, h, labels_.box.begin[2]);
      value_row_[j] = values_.at(inside, h, values_.box.begin[2]);
      if (shares_) share_row_[j] = shares_->at(row, h, shares_->box.begin[2]);
    }
  }

  // As Pool's.
  void run(int64_t column, const TileOutput<T>& out, V* totals) const {
    if (shares_)
      all_rows<true>(column, out, totals);
    else
      all_rows<false>(column, out, totals);
  }

  // Number of agreeing pixels of a vector of centres in row i.
  V agreement(int64_t i, int64_t column) const {
    V sum{};
    for (int y = 0; y < kAcross; ++y)
      for (int x = 0; x < kAcross; ++x) sum += agree(i, column, y, x) ? S::fill(1) : V{};
    return sum;
  }

 private:
  static constexpr int kAcross = 3;
  // Rows of centres that share what is loaded: as many as there are registers for.
  static constexpr int kRows = kVectorMasks ? 2 : 1;

  DYNPLAN_INLINE M agree(int64_t i, int64_t column, int y, int x) const {
    const M own = S::load(label_row_[i + 1] + column);
    return (S::load(label_row_[i + y] + column + x - 1) == own) & (own >= 0);
  }

  template <bool kGather>
  void all_rows(int64_t column, const TileOutput<T>& out, V* totals) const {
    int64_t i = 0;
    for (; i + kRows <= count_; i += kRows) rows<kGather, kRows>(i, column, out, totals);
    for (; i < count_; ++i) rows<kGather, 1>(i, column, out, totals);
  }

  template <bool kGather, int kHeight>
  DYNPLAN_INLINE void rows(int64_t first, int64_t column, const TileOutput<T>& out, V* totals) const {
    V weight[kHeight][kAcross][kAcross];
#pragma GCC unroll 2
    for (int i = 0; i < kHeight; ++i) {
      V total{};
#pragma GCC unroll 3
      for (int y = 0; y < kAcross; ++y)
#pragma GCC unroll 3
        for (int x = 0; x < kAcross; ++x) {
          const M wanted = agree(first + i, column, y, x);
          V w = S::fill(weight_[y][x]);
          if constexpr (kGather)
            w *= S::load(share_row_[first + i + y] + column + x - 1);
          else
            total += wanted ? S::fill(part_[y][x]) : V{};
          weight[i][y][x] = wanted ? w : V{};
        }
      if constexpr (!kGather) totals[first + i] = total;
    }
    const T* row[kHeight + kAcross - 1];
    for (int j = 0; j < kHeight + kAcross - 1; ++j) row[j] = value_row_[first + j] + column;
    const int64_t class_stride = values_.class_stride;
    for (int64_t c = 0; c < classes_; ++c) {
      V sums[kHeight]{};
#pragma GCC unroll 4
      for (int j = 0; j < kHeight + kAcross - 1; ++j) {
        V value[kAcross];
        S::load_around(row[j] + c * class_stride, value);
#pragma GCC unroll 3
        for (int x = 0; x < kAcross; ++x)
#pragma GCC unroll 2
          for (int i = 0; i < kHeight; ++i)
            if (j >= i && j < i + kAcross) sums[i] += weight[i][j - i][x] * value[x];
      }
#pragma GCC unroll 2
      for (int i = 0; i < kHeight; ++i) S::store(out.row[first + i] + c * out.class_stride, sums[i]);
    }
  }

  const int64_t last_row_;
  const Ring<Int>& labels_;
  const Ring<T>& values_;
  const Ring<T>* const shares_;
  const int64_t classes_;
  T weight_[kAcross][kAcross];
  T part_[kAcross][kAcross];  // of the normaliser
  int64_t count_ = 0;
  const Int* label_row_[kRegionStrip + kAcross - 1] = {};
  const T* value_row_[kRegionStrip + kAcross - 1] = {};
  const T* share_row_[kRegionStrip + kAcross - 1] = {};
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
