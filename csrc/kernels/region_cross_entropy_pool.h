// The inner loop: sums over windows, sum over taps of w(p,q) [y_p = y_q] value_p, for a block of centres and
// all classes. The forward takes them over logits; the backward, windows and agreement being symmetric, over
// gradients.
//
// w depends on the ring max |offset| alone, so a window of one label is a sum of nested boxes,
// w = sum over e of (w_e - w_{e+1}) box_e, and separable: about 4 r operations in place of (2 r + 1)^2. That
// carries over to windows of several labels: each column is summed over the pixels that agree with its own
// pixel in the centre's row, and a centre takes the columns whose pixel in its row agrees with it. What that
// misses, pixels that agree with the centre although their column's pixel in its row does not (at slanted
// borders and corners), is added tap by tap. Masks and taps are made once for all classes.
//
// Blocks of images are strips of rows, so that a row is read from the second-level cache about twice and not
// 2 r + 1 times. Weights that are not of that form (axes of different radii or spacings) take every tap.
#pragma once

#include "kernels/region_cross_entropy_windows.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Calls f.template operator()<k>(first) for blocks of k <= 8 classes. Eight sums hide the latency of the
// multiply-add and share each load of a weight.
template <class F>
inline void for_class_blocks(int64_t classes, F f) {
  const int64_t size = ceil_div(classes, larger(1, ceil_div(classes, 8)));
  for (int64_t first = 0; first < classes; first += size) {
    switch (smaller(size, classes - first)) {
      case 1:
        f.template operator()<1>(first);
        break;
      case 2:
        f.template operator()<2>(first);
        break;
      case 3:
        f.template operator()<3>(first);
        break;
      case 4:
        f.template operator()<4>(first);
        break;
      case 5:
        f.template operator()<5>(first);
        break;
      case 6:
        f.template operator()<6>(first);
        break;
      case 7:
        f.template operator()<7>(first);
        break;
      case 8:
        f.template operator()<8>(first);
        break;
    }
  }
}

// Where the sums of a block go: class c of row i to row[i] + c * class_stride.
template <class T>
struct BlockOutput {
  T* row[kRegionStrip];
  int64_t class_stride;
};

template <class T>
class Pool : public BlockWindows<T> {
  using Base = BlockWindows<T>;
  using Base::agree_, Base::count_, Base::cut_end_, Base::cuts_, Base::extra_, Base::first_row_, Base::full_,
      Base::full_end_, Base::kLanes, Base::labels_, Base::nested_, Base::own_, Base::p_, Base::rows_,
      Base::sides_, Base::strip_, Base::values_;
  using typename Base::Cut;

 public:
  using typename Base::Int;
  using typename Base::M;
  using typename Base::S;
  using typename Base::V;

  Pool(const RegionCrossEntropyParams& params, const Ring<Int>& labels, const Ring<T>& values,
       int64_t classes)
      : Base(params, labels, values), classes_(classes), by_count_(p_.normalize == RegionNormalize::count) {
    const int r = p_.radius[2];
    for (int e = 0; e <= r; ++e) {
      step_[e] = static_cast<T>(p_.axis_weight[2][e] - (e < r ? p_.axis_weight[2][e + 1] : 0));
      total_step_[e] = by_count_ ? T(e == r) : step_[e];
    }
    for (T& one : ones_) one = 1;
  }

  // Sums of the centres in the ring's columns [column, column + count), at most kRegionSegment. Writes whole
  // vectors. `totals`, if not null, gets the normaliser of each centre, row i at i * kRegionSegment.
  void run(int64_t column, int64_t count, const BlockOutput<T>& out, T* totals) {
    this->plan(column, count);
    if (!nested_)
      clear(out, totals);
    else
      add_windows(column, count, out, totals);
    // What the columns miss.
    this->for_taps([&](const Cut& cut, int64_t row) {
      add_taps(cut, column, out.row[row] + cut.x, out.class_stride);
      if (!totals) return;
      T* total = totals + row * kRegionSegment + cut.x;
      V sum = S::load(total);
      for (int64_t t = cut.first; t < cut.last; ++t)
        sum += S::masked(agree_[t], S::fill(by_count_ ? T(1) : extra_[t].weight));
      S::store(total, sum);
    });
  }

 private:
  // A segment, its halo, and what alignment adds at both ends.
  static constexpr int64_t kWidth = kRegionSegment + 2 * (kRegionMaxRadius + 1) + 2 * kLanes;
  static constexpr int64_t kColumns = kRegionStrip * (kRegionMaxRadius + 1) * kWidth;
  static constexpr int kMaxStripRadius = 3;

  void clear(const BlockOutput<T>& out, T* totals) const {
    int i = 0;
    for (int64_t row = 0; row < count_; ++row)
      for (; i < cut_end_[row]; ++i) {
        if (totals) S::store(totals + row * kRegionSegment + cuts_[i].x, V{});
        for (int64_t c = 0; c < classes_; ++c)
          S::store(out.row[row] + c * out.class_stride + cuts_[i].x, V{});
      }
  }

  void add_windows(int64_t column, int64_t count, const BlockOutput<T>& out, T* totals) {
    switch (p_.radius[2]) {
      case 0:
        return pool<0>(column, count, out, totals);
      case 1:
        return pool<1>(column, count, out, totals);
      case 2:
        return pool<2>(column, count, out, totals);
      case 3:
        return pool<3>(column, count, out, totals);
      case 4:
        return pool<4>(column, count, out, totals);
      case 5:
        return pool<5>(column, count, out, totals);
      case 6:
        return pool<6>(column, count, out, totals);
      case 7:
        return pool<7>(column, count, out, totals);
    }
  }

  template <int kRadius>
  void pool(int64_t column, int64_t count, const BlockOutput<T>& out, T* totals) {
    // Vectors of columns that the block's windows cover: [begin, end) in the ring.
    const int64_t begin = (column - kRadius) / kLanes * kLanes, end = column + count + kRadius;
    const int64_t shift = column - begin;
    if constexpr (kRadius <= kMaxStripRadius) {
      if (strip_ > 1) mask_strip<kRadius>(begin, end);
    }
    if (totals) {
      BlockOutput<T> to{{}, 0};
      for (int64_t i = 0; i < kRegionStrip; ++i) to.row[i] = totals + i * kRegionSegment;
      add_rows<kRadius>(nullptr, begin, end, total_step_, columns_[0]);
      add_columns<kRadius, 1>(shift, to, 0);
    }
    // Two classes between writing column sums and reading them at other alignments, which cannot be forwarded
    // from the store buffer.
    int64_t c = 0;
    for (; c + 2 <= classes_; c += 2) {
      const T* values = values_.data + c * values_.class_stride;
      add_rows<kRadius>(values, begin, end, step_, columns_[0]);
      add_rows<kRadius>(values + values_.class_stride, begin, end, step_, columns_[1]);
      add_columns<kRadius, 2>(shift, out, c);
    }
    if (c < classes_) {
      add_rows<kRadius>(values_.data + c * values_.class_stride, begin, end, step_, columns_[0]);
      add_columns<kRadius, 1>(shift, out, c);
    }
  }

  void add_taps(const Cut& cut, int64_t column, T* out, int64_t stride) const {
    const T* values = values_.data + column + cut.x;
    for_class_blocks(classes_, [&]<int kClasses>(int64_t first) {
      const T* block = values + first * values_.class_stride;
      V sums[kClasses];
#pragma GCC unroll 8
      for (int k = 0; k < kClasses; ++k) sums[k] = S::load(out + (first + k) * stride);
      for (int64_t t = cut.first; t < cut.last; ++t) {
        const M agree = agree_[t];
        const V weight = S::fill(extra_[t].weight);
        const T* from = block + extra_[t].value;
#pragma GCC unroll 8
        for (int k = 0; k < kClasses; ++k)
          sums[k] += weight * S::masked(agree, S::load(from + k * values_.class_stride));
      }
#pragma GCC unroll 8
      for (int k = 0; k < kClasses; ++k) S::store(out + (first + k) * stride, sums[k]);
    });
  }

  // masks_: for e in 1..r and rows j and j + e of the strip's windows, where their labels are the same;
  // plain_: columns where all are.
  template <int kRadius>
  void mask_strip(int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x += kLanes) {
      M same = S::fill_int(-1);
      for (int e = 1; e <= kRadius; ++e)
        for (int j = kRadius - e; j < kRegionStrip + kRadius; ++j) {
          const M mask =
              S::load(labels_.data + rows_[j].label + x) == S::load(labels_.data + rows_[j + e].label + x);
          S::store(masks_[e - 1][j] + (x - begin), mask);
          same &= mask;
        }
      plain_[(x - begin) / kLanes] = S::all(same);
    }
  }

  // columns[e]: the sum over rows of what a column |offset| = e weighs, for each row of centres. Ones stand
  // in for values that are null.
  template <int kRadius>
  void add_rows(const T* values, int64_t begin, int64_t end, const T* step, T* columns) const {
    V steps[kRadius + 1];
    for (int e = 0; e <= kRadius; ++e) steps[e] = S::fill(step[e]);
    if constexpr (kRadius <= kMaxStripRadius) {
      if (strip_ > 1) {
        const T* rows[kRegionStrip + 2 * kRadius];
        for (int i = 0; i < kRegionStrip + 2 * kRadius; ++i)
          rows[i] = values ? values + rows_[i].value + begin : ones_;
        return add_strip<kRadius>(rows, masks_, plain_, steps, end - begin, columns);
      }
    }
    for (int64_t x = begin; x < end; x += kLanes) {
      const M own = S::load(own_[0] + x);
      V level[kRadius + 1];
      V sum{};
      for (int e = 0; e <= kRadius; ++e) {
        for (int64_t i = first_row_[e]; i < first_row_[e + 1]; ++i)
          sum += S::masked(S::load(labels_.data + rows_[i].label + x) == own,
                           values ? S::load(values + rows_[i].value + x) : S::fill(1));
        level[e] = sum;
      }
      weigh<kRadius>(level, steps, columns + (x - begin));
    }
  }

  using StripMasks = Int[kMaxStripRadius][kRegionStrip + kMaxStripRadius][kWidth];

  template <int kRadius>
  static void add_strip(const T* const (&given)[kRegionStrip + 2 * kRadius], const StripMasks& masks,
                        const bool* plain, const V (&given_steps)[kRadius + 1], int64_t width, T* columns) {
    constexpr int kRows = kRegionStrip + 2 * kRadius;
    // Copies, that stores through `columns` cannot change.
    const T* rows[kRows];
    V steps[kRadius + 1];
    std::memcpy(rows, given, sizeof rows);
    std::memcpy(steps, given_steps, sizeof steps);
    const auto vector = [&]<bool kPlain>(int64_t x) {
      V v[kRows];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) v[i] = S::load(rows[i] + x);
#pragma GCC unroll 4
      for (int i = 0; i < kRegionStrip; ++i) {
        const int centre = i + kRadius;
        V level[kRadius + 1];
        level[0] = v[centre];
#pragma GCC unroll 3
        for (int e = 1; e <= kRadius; ++e) {
          V above = v[centre - e], below = v[centre + e];
          if constexpr (!kPlain) {
            above = S::masked(S::load(masks[e - 1][centre - e] + x), above);
            below = S::masked(S::load(masks[e - 1][centre] + x), below);
          }
          level[e] = level[e - 1] + (above + below);
        }
        weigh<kRadius>(level, steps, columns + i * (kRadius + 1) * kWidth + x);
      }
    };
    for (int64_t x = 0; x < width; x += kLanes)
      if (plain[x / kLanes])
        vector.template operator()<true>(x);
      else
        vector.template operator()<false>(x);
  }

  template <int kRadius>
  DYNPLAN_INLINE static void weigh(const V (&level)[kRadius + 1], const V (&steps)[kRadius + 1], T* columns) {
    V weighted{};
#pragma GCC unroll 8
    for (int e = kRadius; e >= 0; --e) {
      weighted += steps[e] * level[e];
      S::store(columns + e * kWidth, weighted);
    }
  }

  // Classes c and, where there are two, c + 1. `shift`: the column of the block's first centre in columns_.
  template <int kRadius, int kClasses>
  void add_columns(int64_t shift, const BlockOutput<T>& out, int64_t c) const {
    int i = 0, j = 0;
    for (int64_t row = 0; row < count_; ++row) {
      const T* centres = columns_[0] + shift + row * (kRadius + 1) * kWidth;
      T* to = out.row[row] + c * out.class_stride;
      const int64_t stride = out.class_stride;
      for (const int full = full_end_[row]; i < full; ++i) {
        const int64_t x = full_[i];
#pragma GCC unroll 2
        for (int k = 0; k < kClasses; ++k) {
          const T* centre = centres + k * kColumns + x;
          V sum = S::load(centre);
#pragma GCC unroll 7
          for (int e = 1; e <= kRadius; ++e)
            sum += S::load(centre + e * kWidth - e) + S::load(centre + e * kWidth + e);
          S::store(to + k * stride + x, sum);
        }
      }
      for (const int cuts = cut_end_[row]; j < cuts; ++j) {
        const int64_t x = cuts_[j].x;
        const M* sides = sides_.get() + j * (2 * kRadius + 1) + kRadius;
#pragma GCC unroll 2
        for (int k = 0; k < kClasses; ++k) {
          const T* centre = centres + k * kColumns + x;
          V sum = S::masked(sides[0], S::load(centre));
#pragma GCC unroll 7
          for (int e = 1; e <= kRadius; ++e)
            sum += S::masked(sides[-e], S::load(centre + e * kWidth - e)) +
                   S::masked(sides[e], S::load(centre + e * kWidth + e));
          S::store(to + k * stride + x, sum);
        }
      }
    }
  }

  const int64_t classes_;
  const bool by_count_;
  T step_[kRegionMaxRadius + 1] = {}, total_step_[kRegionMaxRadius + 1] = {};
  bool plain_[kWidth / kLanes];
  alignas(64) StripMasks masks_;
  alignas(64) T ones_[kWidth];
  alignas(64) T columns_[2][kColumns];
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
