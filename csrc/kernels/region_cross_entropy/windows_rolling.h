// Sums over windows that roll down a vector of columns, sum over pixels of w(p,q) [y_p = y_q] value_p, for
// all centres of a band and all classes. The weights are those of windows_general.h, nested boxes,
// and the sums are the same to the bit: a row of values is turned into what it adds to centres 0, 1, ... r
// rows away. Here it is read once for all of them.
#pragma once

#include "kernels/region_cross_entropy/column.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Numbers of a vector of columns: class c of row i at data + c * class_stride + i * row_stride.
template <class T>
struct Columns {
  T* data;
  int64_t class_stride, row_stride;
};

template <class T>
class Roll {
 public:
  using Plan = ColumnPlan<T>;
  using S = typename Plan::S;
  using V = typename Plan::V;
  using Mask = typename Plan::Mask;

  // Classes that are summed at once. By rows: more would share what is read of a plan, but what is read and
  // written of a column of them has to stay in the first-level cache for the next. By taps: additions of
  // fewer would wait for one another, and for where a row's taps end.
  static constexpr int64_t kClasses = 3, kMostClasses = 9;

  explicit Roll(const RegionCrossEntropyParams& params)
      : radius_(params.radius[2]), by_count_(params.normalize == RegionNormalize::count) {
    for (int e = 0; e <= radius_; ++e) {
      const double* weight = params.axis_weight[2];
      weight_[e] = static_cast<T>(weight[e]);
      step_[e] = static_cast<T>(weight[e] - (e < radius_ ? weight[e + 1] : 0));
      one_[e] = 1;
      one_step_[e] = T(e == radius_);
    }
  }

  // Sums of `classes` classes, at most kMostClasses, for centres in rows [begin, end). Returns the lowest, or
  // a partial one that is lower; NaN is left out.
  T sums(const Plan& plan, const Columns<const T>& from, const Columns<T>& to, int64_t classes, int64_t begin,
         int64_t end) const {
    V lowest{};
    add_rows<Take::values>(plan, from, to, classes, step_, begin, end, lowest);
    add_taps<Take::values>(plan, from, to, classes, weight_, begin, end, lowest);
    T result = 0;
    for (int lane = 0; lane < S::lanes; ++lane) result = lowest[lane] < result ? lowest[lane] : result;
    return result;
  }

  // Whether -inf in a window always makes its sum -inf.
  bool keeps_infinity() const {
    bool all = true;
    for (int e = 0; e <= radius_; ++e) all = all && step_[e] > 0;
    return all;
  }

  // Their normalisers.
  void normalizers(const Plan& plan, const Columns<T>& to, int64_t begin, int64_t end) const {
    V lowest{};
    add_rows<Take::ones>(plan, {}, to, 1, by_count_ ? one_step_ : step_, begin, end, lowest);
    add_taps<Take::ones>(plan, {}, to, 1, by_count_ ? one_ : weight_, begin, end, lowest);
  }
  // The number of agreeing pixels.
  void agreement(const Plan& plan, const Columns<T>& to, int64_t begin, int64_t end) const {
    V lowest{};
    add_rows<Take::ones>(plan, {}, to, 1, one_step_, begin, end, lowest);
    add_taps<Take::ones>(plan, {}, to, 1, one_, begin, end, lowest);
  }

 private:
  enum class Take { values, ones };

  template <Take kTake>
  void add_rows(const Plan& plan, const Columns<const T>& from, const Columns<T>& to, int64_t classes,
                const T* step, int64_t begin, int64_t end, V& lowest) const {
    switch (radius_) {  // 1 goes by taps
      case 0:
        return add_rows<kTake, 0>(plan, from, to, classes, step, begin, end, lowest);
      case 2:
        return add_rows<kTake, 2>(plan, from, to, classes, step, begin, end, lowest);
      case 3:
        return add_rows<kTake, 3>(plan, from, to, classes, step, begin, end, lowest);
      case 4:
        return add_rows<kTake, 4>(plan, from, to, classes, step, begin, end, lowest);
      case 5:
        return add_rows<kTake, 5>(plan, from, to, classes, step, begin, end, lowest);
      case 6:
        return add_rows<kTake, 6>(plan, from, to, classes, step, begin, end, lowest);
      case 7:
        return add_rows<kTake, 7>(plan, from, to, classes, step, begin, end, lowest);
    }
  }

  template <Take kTake, int kRadius>
  void add_rows(const Plan& plan, const Columns<const T>& from, const Columns<T>& to, int64_t classes,
                const T* step, int64_t begin, int64_t end, V& lowest) const {
    if (!plan.pieces()) return;
    // Where there are registers for it.
    constexpr int kMost = kTake == Take::values && kVectorMasks && kRadius <= 3 ? 3 : 1;
    int64_t c = 0;
    for (; c + kMost <= classes; c += kMost)
      roll<kTake, kRadius, kMost>(plan, from, to, step, begin, end, c, lowest);
    for (; c < classes; ++c) roll<kTake, kRadius, 1>(plan, from, to, step, begin, end, c, lowest);
  }

  // Sums of kClasses classes whose windows hold the row of pixels that is next: of the centres from radius
  // rows above it on.
  template <int kRadius, int kClasses>
  struct Open {
    static constexpr int kCentres = 2 * kRadius;
    V sums[kClasses][kCentres + 1];
    V lowest;  // of complete ones

    // Adds the first share of a row that begins at `at`; the oldest centre is complete and goes to `to`. Of
    // all pixels or centres where their masks are null.
    template <Take kTake, bool kPixels, bool kTheseCentres>
    DYNPLAN_INLINE void add(const V* steps, const T* at, int64_t class_stride, const Mask* pixels,
                            const Mask* centres, T* to, int64_t to_class_stride) {
      V share[kClasses][kRadius + 1];
      sum<kTake, kPixels>(steps, at, class_stride, pixels, share);
      Mask takes[kCentres + 1] = {};
#pragma GCC unroll 15
      for (int i = 0; kTheseCentres && i <= kCentres; ++i) takes[i] = centres[i];
#pragma GCC unroll 4
      for (int k = 0; k < kClasses; ++k) {
        const auto plus = [&](V sum, int i) __attribute__((always_inline)) {
          const V more = share[k][i < kRadius ? kRadius - i : i - kRadius];
          return kTheseCentres ? S::add_masked(sum, more, takes[i]) : sum + more;
        };
        const V newest = kTheseCentres ? S::masked(takes[kCentres], share[k][kRadius]) : share[k][kRadius];
        const V done = kRadius == 0 ? newest : plus(sums[k][0], 0);
#pragma GCC unroll 14
        for (int i = 1; i < kCentres; ++i) sums[k][i - 1] = plus(sums[k][i], i);
        if constexpr (kRadius > 0) sums[k][kCentres - 1] = newest;
        complete(done, to + k * to_class_stride);
      }
    }

    // Adds another share of a row, before its first.
    template <Take kTake>
    DYNPLAN_INLINE void add_more(const V* steps, const T* at, int64_t class_stride, const Mask* pixels,
                                 const Mask* centres) {
      V share[kClasses][kRadius + 1];
      sum<kTake, true>(steps, at, class_stride, pixels, share);
      Mask takes[kCentres + 1] = {};
#pragma GCC unroll 14
      for (int i = 0; i < kCentres; ++i) takes[i] = centres[i];
#pragma GCC unroll 4
      for (int k = 0; k < kClasses; ++k)
#pragma GCC unroll 14
        for (int i = 0; i < kCentres; ++i)
          sums[k][i] = S::add_masked(sums[k][i], share[k][i < kRadius ? kRadius - i : i - kRadius], takes[i]);
    }

    // A row that adds nothing.
    DYNPLAN_INLINE void skip(T* to, int64_t to_class_stride) {
      for (int k = 0; k < kClasses; ++k) {
        complete(sums[k][0], to + k * to_class_stride);
        for (int i = 1; i <= kCentres; ++i) sums[k][i - 1] = i < kCentres ? sums[k][i] : V{};
      }
    }

    DYNPLAN_INLINE void complete(V done, T* to) {
      lowest = S::min(done, lowest);
      S::store(to, done);
    }

    template <Take kTake, bool kPixels>
    DYNPLAN_INLINE void sum(const V* steps, const T* at, int64_t class_stride, const Mask* pixels,
                            V (&share)[kClasses][kRadius + 1]) {
      // Loaded once: a mask may be of a character type, which any store might change.
      Mask agree[2 * kRadius + 1] = {};
#pragma GCC unroll 15
      for (int x = 0; kPixels && x <= 2 * kRadius; ++x) agree[x] = pixels[x];
#pragma GCC unroll 4
      for (int k = 0; k < kClasses; ++k) {
        const T* from = at + k * class_stride;
        const auto value = [&](int x) __attribute__((always_inline)) {
          if constexpr (kTake == Take::ones)
            return kPixels ? S::masked(agree[kRadius + x], S::fill(1)) : S::fill(1);
          else if constexpr (kPixels)
            return S::load_masked(from + x, agree[kRadius + x]);
          else
            return S::load(from + x);
        };
        const auto both = [&](int x) __attribute__((always_inline)) {
          if constexpr (kTake == Take::values && kPixels)
            return S::add_masked(value(-x), S::load(from + x), agree[kRadius + x]);
          else
            return value(-x) + value(x);
        };
        row_shares<S, kRadius>(steps, value(0), both, share[k]);
      }
    }
  };

  template <Take kTake, int kRadius, int kClasses>
  void roll(const Plan& plan, const Columns<const T>& from, const Columns<T>& to, const T* step,
            int64_t begin, int64_t end, int64_t c, V& lowest) const {
    using Kind = typename Plan::Kind;
    V steps[kRadius + 1];
    for (int e = 0; e <= kRadius; ++e) steps[e] = S::fill(step[e]);
    const T* values = from.data + c * from.class_stride;
    T* wanted = to.data + c * to.class_stride - kRadius * to.row_stride;
    V unwanted[kClasses];  // sums of centres above the first
    Open<kRadius, kClasses> open{};
    open.lowest = lowest;
    const auto* piece = plan.pieces();
    for (int64_t row = begin - kRadius; row < end + kRadius;) {
      while (piece->end <= row) ++piece;
      const bool above = row < begin + kRadius;
      const int64_t last = smaller(piece->end, (above ? begin : end) + kRadius);
      const Columns<T> out = above ? Columns<T>{reinterpret_cast<T*>(unwanted), S::lanes, 0}
                                   : Columns<T>{wanted, to.class_stride, to.row_stride};
      const auto rows = [&](auto add) __attribute__((always_inline)) {
        for (; row < last; ++row) add(values + row * from.row_stride, out.data + row * out.row_stride);
      };
      switch (piece->kind) {
        case Kind::none:
          rows([&](const T*, T* done) __attribute__((always_inline)) { open.skip(done, out.class_stride); });
          break;
        case Kind::plain:
          rows([&](const T* at, T* done) __attribute__((always_inline)) {
            open.template add<kTake, false, false>(steps, at, from.class_stride, nullptr, nullptr, done,
                                                   out.class_stride);
          });
          break;
        case Kind::pixels:
          rows([&](const T* at, T* done) __attribute__((always_inline)) {
            open.template add<kTake, true, false>(steps, at, from.class_stride, plan.pixels(plan.share(row)),
                                                  nullptr, done, out.class_stride);
          });
          break;
        case Kind::centres:
          rows([&](const T* at, T* done) __attribute__((always_inline)) {
            open.template add<kTake, false, true>(steps, at, from.class_stride, nullptr,
                                                  plan.centres(plan.share(row)), done, out.class_stride);
          });
          break;
        case Kind::both:
          rows([&](const T* at, T* done) __attribute__((always_inline)) {
            const int64_t first = plan.share(row);
            for (int64_t s = first + 1; s < plan.share(row + 1); ++s)
              open.template add_more<kTake>(steps, at, from.class_stride, plan.pixels(s), plan.centres(s));
            open.template add<kTake, true, true>(steps, at, from.class_stride, plan.pixels(first),
                                                 plan.centres(first), done, out.class_stride);
          });
          break;
      }
    }
    lowest = open.lowest;
  }

  template <Take kTake>
  void add_taps(const Plan& plan, const Columns<const T>& from, const Columns<T>& to, int64_t classes,
                const T* weight, int64_t begin, int64_t end, V& lowest) const {
    for (int i = 0; i < plan.num_tap_rows(); ++i) {
      const auto& row = plan.tap_row(i);
      if (row.row < begin || row.row >= end) continue;
      int64_t c = 0;
      for (; c + kMostClasses <= classes; c += kMostClasses)
        add_taps<kTake, kMostClasses>(plan, row, from, to, weight, c, lowest);
      for (; c + kClasses <= classes; c += kClasses)
        add_taps<kTake, kClasses>(plan, row, from, to, weight, c, lowest);
      for (; c < classes; ++c) add_taps<kTake, 1>(plan, row, from, to, weight, c, lowest);
    }
  }

  template <Take kTake, int64_t kMany>
  void add_taps(const Plan& plan, const typename Plan::TapRow& row, const Columns<const T>& from,
                const Columns<T>& to, const T* weight, int64_t c, V& lowest) const {
    V sums[kMany]{};
    for (int64_t t = row.begin; t < row.end; ++t) {
      const auto& tap = plan.tap(t);
      const V w = S::fill(weight[tap.distance]);
      const T* at = kTake == Take::ones
                        ? nullptr
                        : from.data + (row.row + tap.y) * from.row_stride + tap.x + c * from.class_stride;
#pragma GCC unroll 9
      for (int k = 0; k < kMany; ++k)
        if constexpr (kTake == Take::ones)
          sums[k] += S::masked(tap.agree, w);
        else
          sums[k] += w * S::load_masked(at + k * from.class_stride, tap.agree);
    }
#pragma GCC unroll 9
    for (int k = 0; k < kMany; ++k) {
      lowest = S::min(sums[k], lowest);
      S::store(to.data + row.row * to.row_stride + (c + k) * to.class_stride, sums[k]);
    }
  }

  const int radius_;
  const bool by_count_;
  // Of pixels at some distance: weights, and what they have more than those one further away.
  T weight_[kRegionMaxRadius + 1] = {}, step_[kRegionMaxRadius + 1] = {};
  T one_[kRegionMaxRadius + 1] = {}, one_step_[kRegionMaxRadius + 1] = {};
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
