// Sums over windows that roll down a vector of columns, sum over pixels of w(p,q) [y_p = y_q] value_p, for
// all centres of a band and all classes. The weights are those of region_cross_entropy_pool.h, nested boxes,
// and the sums are the same to the bit: a row of values is turned into what it adds to centres 0, 1, ... r
// rows away. Here it is read once for all of them.
#pragma once

#include "kernels/region_cross_entropy_column.h"

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

  // Classes that are summed at once. Where three share what is read of a plan no more than that, for what is
  // staged of them nearly fits the first-level cache.
  static constexpr int64_t kClasses = kVectorMasks ? 3 : 9;

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

  // Sums of `classes` classes, at most kClasses, for centres in rows [begin, end).
  void sums(const Plan& plan, const Columns<const T>& from, const Columns<T>& to, int64_t classes,
            int64_t begin, int64_t end) const {
    add_rows<Take::values>(plan, from, to, classes, step_, begin, end);
    add_taps<Take::values>(plan, from, to, classes, weight_, begin, end);
  }

  // Their normalisers.
  void normalizers(const Plan& plan, const Columns<T>& to, int64_t begin, int64_t end) const {
    add_rows<Take::ones>(plan, {}, to, 1, by_count_ ? one_step_ : step_, begin, end);
    add_taps<Take::ones>(plan, {}, to, 1, by_count_ ? one_ : weight_, begin, end);
  }
  // The number of agreeing pixels.
  void agreement(const Plan& plan, const Columns<T>& to, int64_t begin, int64_t end) const {
    add_rows<Take::ones>(plan, {}, to, 1, one_step_, begin, end);
    add_taps<Take::ones>(plan, {}, to, 1, one_, begin, end);
  }

 private:
  enum class Take { values, ones };

  template <Take kTake>
  void add_rows(const Plan& plan, const Columns<const T>& from, const Columns<T>& to, int64_t classes,
                const T* step, int64_t begin, int64_t end) const {
    switch (radius_) {  // 1 goes by taps
      case 0:
        return add_rows<kTake, 0>(plan, from, to, classes, step, begin, end);
      case 2:
        return add_rows<kTake, 2>(plan, from, to, classes, step, begin, end);
      case 3:
        return add_rows<kTake, 3>(plan, from, to, classes, step, begin, end);
      case 4:
        return add_rows<kTake, 4>(plan, from, to, classes, step, begin, end);
      case 5:
        return add_rows<kTake, 5>(plan, from, to, classes, step, begin, end);
      case 6:
        return add_rows<kTake, 6>(plan, from, to, classes, step, begin, end);
      case 7:
        return add_rows<kTake, 7>(plan, from, to, classes, step, begin, end);
    }
  }

  template <Take kTake, int kRadius>
  void add_rows(const Plan& plan, const Columns<const T>& from, const Columns<T>& to, int64_t classes,
                const T* step, int64_t begin, int64_t end) const {
    // Where there are registers for it.
    constexpr int kMost = kTake == Take::values && kVectorMasks && kRadius <= 3 ? 3 : 1;
    for (int k = 0; k < plan.num_passes(); ++k) {
      const auto& pass = plan.pass(k);
      for (int i = 0; i < pass.num_runs; ++i) {
        typename Plan::Run run = pass.runs[i];
        run.begin = larger(run.begin, begin);
        run.end = smaller(run.end, end);
        if (run.begin >= run.end) continue;
        for (int64_t c = 0; c < classes;) {
          const bool all = classes - c >= kMost;
          if (k == 0 && all)
            add_run<kTake, kRadius, kMost, false>(pass, run, from, to, step, c);
          else if (k == 0)
            add_run<kTake, kRadius, 1, false>(pass, run, from, to, step, c);
          else if (all)
            add_run<kTake, kRadius, kMost, true>(pass, run, from, to, step, c);
          else
            add_run<kTake, kRadius, 1, true>(pass, run, from, to, step, c);
          c += all ? kMost : 1;
        }
      }
    }
  }

  // Sums of kClasses classes whose windows hold the row of pixels that is next: of the centres from radius
  // rows above it on.
  template <int kRadius, int kClasses>
  struct Open {
    static constexpr int kCentres = 2 * kRadius;
    V sums[kClasses][kCentres + 1];

    // Adds a row that begins at `at`; the oldest centre is complete and goes to `to`. `agrees` is null where
    // all pixels do.
    template <Take kTake, bool kPlain, bool kStore, bool kAdd>
    DYNPLAN_INLINE void add(const V* steps, const T* at, int64_t class_stride, const Mask* agrees, T* to,
                            int64_t to_class_stride, Mask mine) {
      // Loaded once: a mask may be of a character type, which any store might change.
      Mask agree[2 * kRadius + 1] = {};
#pragma GCC unroll 15
      for (int x = 0; !kPlain && x <= 2 * kRadius; ++x) agree[x] = agrees[x];
#pragma GCC unroll 4
      for (int k = 0; k < kClasses; ++k) {
        const T* from = at + k * class_stride;
        const auto value = [&](int x) __attribute__((always_inline)) {
          if constexpr (kTake == Take::ones)
            return kPlain ? S::fill(1) : S::masked(agree[kRadius + x], S::fill(1));
          else if constexpr (kPlain)
            return S::load(from + x);
          else
            return S::load_masked(from + x, agree[kRadius + x]);
        };
        const auto both = [&](int x) __attribute__((always_inline)) {
          if constexpr (kTake == Take::values && !kPlain)
            return S::add_masked(value(-x), from + x, agree[kRadius + x]);
          else
            return value(-x) + value(x);
        };
        V share[kRadius + 1];
        row_shares<S, kRadius>(steps, value(0), both, share);
        V done = kRadius == 0 ? share[0] : sums[k][0] + share[kRadius];
#pragma GCC unroll 14
        for (int i = 1; i < kCentres; ++i)
          sums[k][i - 1] = sums[k][i] + share[i < kRadius ? kRadius - i : i - kRadius];
        if constexpr (kRadius > 0) sums[k][kCentres - 1] = share[kRadius];
        if constexpr (kStore) {
          T* out = to + k * to_class_stride;
          if constexpr (!kPlain) done = S::masked(mine, done);
          if constexpr (!kPlain && kAdd) done += S::load(out);
          S::store(out, done);
        }
      }
    }
  };

  template <Take kTake, int kRadius, int kClasses, bool kAdd>
  void add_run(const typename Plan::Pass& pass, const typename Plan::Run& run, const Columns<const T>& from,
               const Columns<T>& to, const T* step, int64_t c) const {
    constexpr int kAcross = 2 * kRadius + 1;
    V steps[kRadius + 1];
    for (int e = 0; e <= kRadius; ++e) steps[e] = S::fill(step[e]);
    const int64_t full = run.begin + kRadius;  // windows of centres are complete from this row of pixels on
    const T* values = from.data + c * from.class_stride;
    T* out = to.data + c * to.class_stride - kRadius * to.row_stride;
    const Mask* agree = pass.agree.get();
    Open<kRadius, kClasses> open{};
    for (int64_t row = run.begin - kRadius; row < full; ++row)
      open.template add<kTake, false, false, kAdd>(steps, values + row * from.row_stride, from.class_stride,
                                                   agree + row * kAcross, nullptr, 0, Mask{});
    for (const auto* piece = run.first; piece < run.last; ++piece) {
      const int64_t begin = larger(piece->begin, full), end = smaller(piece->end, run.end + kRadius);
      if (piece->plain) {
        for (int64_t row = begin; row < end; ++row)
          open.template add<kTake, true, true, kAdd>(steps, values + row * from.row_stride, from.class_stride,
                                                     nullptr, out + row * to.row_stride, to.class_stride,
                                                     Mask{});
      } else {
        for (int64_t row = begin; row < end; ++row)
          open.template add<kTake, false, true, kAdd>(
              steps, values + row * from.row_stride, from.class_stride, agree + row * kAcross,
              out + row * to.row_stride, to.class_stride, pass.mine[row - kRadius]);
      }
    }
  }

  template <Take kTake>
  void add_taps(const Plan& plan, const Columns<const T>& from, const Columns<T>& to, int64_t classes,
                const T* weight, int64_t begin, int64_t end) const {
    for (int i = 0; i < plan.num_tap_rows(); ++i) {
      const auto& row = plan.tap_row(i);
      if (row.row < begin || row.row >= end) continue;
      int64_t c = 0;
      for (; c + kClasses <= classes; c += kClasses)
        add_taps<kTake, kClasses>(plan, row, from, to, weight, c);
      for (; c + 3 <= classes; c += 3) add_taps<kTake, 3>(plan, row, from, to, weight, c);
      for (; c < classes; ++c) add_taps<kTake, 1>(plan, row, from, to, weight, c);
    }
  }

  template <Take kTake, int64_t kMany>
  void add_taps(const Plan& plan, const typename Plan::TapRow& row, const Columns<const T>& from,
                const Columns<T>& to, const T* weight, int64_t c) const {
    V sums[kMany]{};
    for (int64_t t = row.begin; t < row.end; ++t) {
      const auto& tap = plan.tap(t);
      const V w = S::fill(weight[tap.distance]);
      const T* at = from.data + (row.row + tap.y) * from.row_stride + tap.x + c * from.class_stride;
#pragma GCC unroll 9
      for (int k = 0; k < kMany; ++k)
        if constexpr (kTake == Take::ones)
          sums[k] += S::masked(tap.agree, w);
        else
          sums[k] += w * S::load_masked(at + k * from.class_stride, tap.agree);
    }
#pragma GCC unroll 9
    for (int k = 0; k < kMany; ++k)
      S::store(to.data + row.row * to.row_stride + (c + k) * to.class_stride, sums[k]);
  }

  const int radius_;
  const bool by_count_;
  // Of pixels at some distance: weights, and what they have more than those one further away.
  T weight_[kRegionMaxRadius + 1] = {}, step_[kRegionMaxRadius + 1] = {};
  T one_[kRegionMaxRadius + 1] = {}, one_step_[kRegionMaxRadius + 1] = {};
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
