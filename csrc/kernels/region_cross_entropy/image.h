// What windows_small.h and pairs.h share: sums as those of
// windows_general.h over windows of images of which every pixel is a centre, tap by tap.
#pragma once

#include "kernels/region_cross_entropy/windows_general.h"

namespace dynplan::kernels::DYNPLAN_ISA {

inline bool is_stepless_image(const RegionCrossEntropyParams& p) {
  const bool flat = p.size[1] == 1 && p.radius[1] == 0;
  return flat && p.stride[0] == 1 && p.stride[1] == 1 && p.stride[2] == 1;
}

template <class T>
class ImageWindows {
 public:
  using S = Simd<T, kWideBytes>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;

  static int64_t strip(const RegionCrossEntropyParams&) { return kRegionStrip; }

  // Number of agreeing pixels of a vector of centres in row i.
  V agreement(int64_t i, int64_t column) const {
    const M own = S::load(label_row_[i + down_] + column);
    V sum{};
    for (int y = 0; y <= 2 * down_; ++y)
      for (int x = -across_; x <= across_; ++x)
        sum += S::masked((S::load(label_row_[i + y] + column + x) == own) & (own >= 0), S::fill(1));
    return sum;
  }

 protected:
  // `shares`, if not null, are factors of the values of all classes, in a ring of the values' columns.
  ImageWindows(const RegionCrossEntropyParams& p, const Ring<Int>& labels, const Ring<T>& values,
               int64_t classes, const Ring<T>* shares)
      : down_(p.radius[0]),
        across_(p.radius[2]),
        last_row_(p.size[0] - 1),
        labels_(labels),
        values_(values),
        shares_(shares),
        classes_(classes) {}

  // Calls f(y, x, weight, part) for the pixels of a window; `part` is what one adds to the normaliser.
  template <class F>
  static void for_taps(const RegionCrossEntropyParams& p, F f) {
    for (int y = -p.radius[0]; y <= p.radius[0]; ++y)
      for (int x = -p.radius[2]; x <= p.radius[2]; ++x) {
        const double down = p.axis_weight[0][std::abs(y)], across = p.axis_weight[2][std::abs(x)];
        const T weight = static_cast<T>(down < across ? down : across);
        f(y, x, weight, p.normalize == RegionNormalize::count ? T(1) : weight);
      }
  }

  // Centres are in the `count` rows (d + i, h); values_of(row) are those of a row of the image. Rows outside
  // agree with none, but may be multiplied: the nearest stands for them.
  template <class F>
  void aim_rows(int64_t d, int64_t h, int64_t count, F values_of) {
    count_ = count;
    for (int64_t j = 0; j < count + 2 * down_; ++j) {
      const int64_t row = d + j - down_, inside = larger(0, smaller(last_row_, row));
      label_row_[j] = labels_.at(row, h, labels_.box.begin[2]);
      value_row_[j] = values_of(inside);
      if (shares_) share_row_[j] = shares_->at(inside, h, shares_->box.begin[2]);
    }
  }

  const int down_, across_;  // radii
  const int64_t last_row_;
  const Ring<Int>& labels_;
  const Ring<T>& values_;
  const Ring<T>* const shares_;
  const int64_t classes_;
  int64_t count_ = 0;
  // Of the rows that windows reach, from the first.
  static constexpr int kMostRows = kRegionStrip + 2 * kRegionMaxRadius;
  const Int* label_row_[kMostRows] = {};
  const T* value_row_[kMostRows] = {};
  const T* share_row_[kMostRows] = {};
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
