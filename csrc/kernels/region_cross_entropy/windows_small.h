// The inner loop for small windows on images, where bands.h does not take them: sums as
// those of windows_general.h, of one vector of the widest kind in each row of a strip. Every pixel
// of a window, a tap, gets a vector of weights, 0 in the lanes of which it does not agree. Weights are made
// from the labels once for all classes, so that sums cost the same wherever labels end. Windows of 3 x 3 keep
// them in registers. With larger ones classes share what is loaded of them, and windows of one label are
// summed as nested boxes; that pays up to a radius of kMostTapped.
//
// Every lane of every tap is multiplied: values have to be finite where pixels do not count.
#pragma once

#include "kernels/region_cross_entropy/image.h"

namespace dynplan::kernels::DYNPLAN_ISA {

inline constexpr int kMostTapped = kVectorMasks ? 3 : 1;

inline bool takes_taps(const RegionCrossEntropyParams& p) {
  const int r = p.radius[2];
  return is_stepless_image(p) && p.radius[0] == r && r >= 1 && r <= kMostTapped;
}

template <class T>
class Taps : public ImageWindows<T> {
  using Base = ImageWindows<T>;
  using Base::classes_, Base::count_, Base::down_, Base::label_row_, Base::share_row_, Base::shares_,
      Base::value_row_, Base::values_;

 public:
  using typename Base::Int;
  using typename Base::M;
  using typename Base::S;
  using typename Base::V;
  static constexpr bool kShares = true, kFinite = true, kKeeps = false;

  Taps(const RegionCrossEntropyParams& p, const Ring<Int>& labels, const Ring<T>& values, int64_t classes,
       const Ring<T>* shares = nullptr)
      : Base(p, labels, values, classes, shares) {
    int tap = 0;
    Base::for_taps(p, [&](int, int, T weight, T part) {
      weight_[tap] = weight;
      part_[tap++] = part;
      whole_ += part;
    });
    for (int e = 0; e <= down_; ++e) {
      const double* weight = p.axis_weight[2];
      nested_ = nested_ && weight[e] == p.axis_weight[0][e];
      step_[e] = static_cast<T>(weight[e] - (e < down_ ? weight[e + 1] : 0));
    }
  }

  static Taps gathering(const RegionCrossEntropyParams& p, const Ring<Int>& labels, const Ring<T>& values,
                        const Ring<T>& shares, int64_t classes) {
    return Taps(p, labels, values, classes, &shares);
  }

  // As Pool's.
  void aim(int64_t d, int64_t h, int64_t count, bool /*anchors*/) {
    this->aim_rows(d, h, count, [&](int64_t row) { return values_.at(row, h, values_.box.begin[2]); });
  }

  void run(int64_t column, const TileOutput<T>& out, V* totals) {
    if constexpr (kMostTapped > 1) {
      if (down_ == 2) return tile<2>(column, out, totals);
      if (down_ == 3) return tile<3>(column, out, totals);
    }
    tile<1>(column, out, totals);
  }

 private:
  // Rows of centres, and classes, that share what is loaded: as many as there are registers for.
  template <int kRadius>
  static constexpr int kRows = kRadius > 1    ? kRegionStrip
                               : kVectorMasks ? 2
                                              : 1;
  template <int kRadius>
  static constexpr int kClasses = kRadius > 1 ? 3 : 1;

  template <int kRadius>
  void tile(int64_t column, const TileOutput<T>& out, V* totals) {
    if (shares_)
      tile<kRadius, true>(column, out, totals);
    else
      tile<kRadius, false>(column, out, totals);
  }

  template <int kRadius, bool kGather>
  void tile(int64_t column, const TileOutput<T>& out, V* totals) {
    if (kRadius > 1 && plain<kRadius>(column)) {
      for (int64_t c = 0; c < classes_; ++c) boxes<kRadius, kGather>(column, c, out);
      for (int64_t i = 0; !kGather && i < kRegionStrip; ++i) totals[i] = S::fill(whole_);
      return;
    }
    int64_t i = 0;
    for (; i + kRows<kRadius> <= count_; i += kRows<kRadius>)
      rows<kRadius, kGather, kRows<kRadius>>(i, column, out, totals);
    for (; i < count_; ++i) rows<kRadius, kGather, 1>(i, column, out, totals);
  }

  // Whether all windows hold one label, and are sums of nested boxes.
  template <int kRadius>
  DYNPLAN_INLINE bool plain(int64_t column) const {
    const Int label = label_row_[kRadius][column];
    if (!nested_ || count_ < kRegionStrip || label < 0) return false;
    M same = S::fill_int(-1);
    for (int j = 0; j < kRegionStrip + 2 * kRadius; ++j)
      same &= (S::load(label_row_[j] + column - kRadius) == label) &
              (S::load(label_row_[j] + column + kRadius) == label);
    return S::all(same);
  }

  template <int kRadius, bool kGather>
  DYNPLAN_INLINE void boxes(int64_t column, int64_t c, const TileOutput<T>& out) const {
    V steps[kRadius + 1], sums[kRegionStrip]{};
    for (int e = 0; e <= kRadius; ++e) steps[e] = S::fill(step_[e]);
#pragma GCC unroll 10
    for (int j = 0; j < kRegionStrip + 2 * kRadius; ++j) {
      V value[2 * kRadius + 1];
      const T* shares = kGather ? share_row_[j] + column : nullptr;
      S::template load_around<kRadius>(value_row_[j] + c * values_.class_stride + column, shares, value);
      const auto both = [&](int x) __attribute__((always_inline)) {
        return value[kRadius - x] + value[kRadius + x];
      };
      V share[kRadius + 1];
      row_shares<S, kRadius>(steps, value[kRadius], both, share);
#pragma GCC unroll 4
      for (int i = 0; i < kRegionStrip; ++i) {
        const int away = i + kRadius < j ? j - i - kRadius : i + kRadius - j;
        if (away <= kRadius) sums[i] += share[away];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRegionStrip; ++i) S::store(out.row[i] + c * out.class_stride, sums[i]);
  }

  template <int kRadius, bool kGather, int kHeight>
  void rows(int64_t first, int64_t column, const TileOutput<T>& out, V* totals) {
    make_weights<kRadius, kGather, kHeight>(first, column, totals);
    if constexpr (kRadius == 1) {
      V kept[9 * kHeight];
#pragma GCC unroll 18
      for (int tap = 0; tap < 9 * kHeight; ++tap) kept[tap] = weights_[tap];
      for (int64_t c = 0; c < classes_; ++c) sums<kRadius, kHeight, 1>(kept, first, column, c, out);
    } else {
      constexpr int kMany = kClasses<kRadius>;
      int64_t c = 0;
      for (; c + kMany <= classes_; c += kMany)
        sums<kRadius, kHeight, kMany>(weights_, first, column, c, out);
      for (; c < classes_; ++c) sums<kRadius, kHeight, 1>(weights_, first, column, c, out);
    }
  }

  // The taps' weights_ of kHeight rows of centres, and `totals` of those that merge.
  template <int kRadius, bool kGather, int kHeight>
  DYNPLAN_INLINE void make_weights(int64_t first, int64_t column, V* totals) {
    constexpr int kAcross = 2 * kRadius + 1;
    M own[kHeight];
    V total[kHeight]{};
    for (int i = 0; i < kHeight; ++i) {
      own[i] = S::load(label_row_[first + i + kRadius] + column);
      own[i] = own[i] >= 0 ? own[i] : S::fill_int(-2);  // agrees with none
    }
    for (int j = 0; j < kHeight + 2 * kRadius; ++j)
#pragma GCC unroll 7
      for (int x = 0; x < kAcross; ++x) {
        const M label = S::load(label_row_[first + j] + column + x - kRadius);
        const V share = kGather ? S::load(share_row_[first + j] + column + x - kRadius) : S::fill(1);
#pragma GCC unroll 4
        for (int i = 0; i < kHeight; ++i) {
          if (j < i || j > i + 2 * kRadius) continue;
          const int tap = (j - i) * kAcross + x;
          const M agrees = label == own[i];
          weights_[i * kAcross * kAcross + tap] = agrees ? share * weight_[tap] : V{};
          if constexpr (!kGather) total[i] += agrees ? S::fill(part_[tap]) : V{};
        }
      }
    for (int i = 0; !kGather && i < kHeight; ++i) totals[first + i] = total[i];
  }

  template <int kRadius, int kHeight, int kMany>
  DYNPLAN_INLINE void sums(const V* weight, int64_t first, int64_t column, int64_t c,
                           const TileOutput<T>& out) const {
    constexpr int kAcross = 2 * kRadius + 1;
    // Additions wait for one another where no other row's or class's are under way.
    constexpr int kParts = kRows<kRadius> * kClasses<kRadius> == 1 ? 2 : 1;
    V sum[kMany][kHeight][kParts]{};
#pragma GCC unroll 10
    for (int j = 0; j < kHeight + 2 * kRadius; ++j) {
      V value[kMany][kAcross];
#pragma GCC unroll 3
      for (int k = 0; k < kMany; ++k)
        S::template load_around<kRadius>(value_row_[first + j] + (c + k) * values_.class_stride + column,
                                         nullptr, value[k]);
#pragma GCC unroll 4
      for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 7
        for (int x = 0; x < kAcross; ++x) {
          if (j < i || j > i + 2 * kRadius) continue;
          V w = weight[(i * kAcross + j - i) * kAcross + x];
          // GCC would load it once a class.
          if constexpr (kMany > 1) asm("" : "+v"(w));
#pragma GCC unroll 3
          for (int k = 0; k < kMany; ++k) sum[k][i][(j - i) % kParts] += w * value[k][x];
        }
    }
#pragma GCC unroll 3
    for (int k = 0; k < kMany; ++k)
#pragma GCC unroll 4
      for (int i = 0; i < kHeight; ++i) {
        if constexpr (kParts == 2) sum[k][i][0] += sum[k][i][1];
        S::store(out.row[first + i] + (c + k) * out.class_stride, sum[k][i][0]);
      }
  }

  static constexpr int kAcrossMost = 2 * kMostTapped + 1;
  V weights_[kRegionStrip * kAcrossMost * kAcrossMost];  // of the centres at hand, row by row
  T weight_[kAcrossMost * kAcrossMost], part_[kAcrossMost * kAcrossMost];  // of a tap, and of the normaliser
  bool nested_ = true;                   // whether both axes have one set of weights: nested boxes,
  T step_[kMostTapped + 1], whole_ = 0;  // of these weights; the normaliser of a whole window
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
