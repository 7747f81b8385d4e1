// The inner loop: sums over windows, sum over taps of w(p,q) [y_p = y_q] value_p, for one row of centres and
// all classes. The forward takes them over logits; the backward, windows and agreement being symmetric, over
// gradients.
//
// Vectors of neighbouring centres come in three kinds. All ignored: zeros. All windows whole and of one
// label, which is most of a segmentation map: w depends on the ring max |offset| alone, so the sum is one of
// nested boxes, w = sum over e of (w_e - w_{e+1}) box_e, and separable: rows are added first, columns after,
// about 4 r operations in place of (2 r + 1)^2. Anything else: weights masked by agreement, made once for all
// classes.
#pragma once

#include "kernels/region_cross_entropy_window.h"

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

template <class T>
class Pool {
 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;
  static constexpr int kLanes = S::lanes;
  static constexpr int64_t kSegment =
      128;  // columns handled at once: their sums stay in the first-level cache

  // `labels` holds classes, or -1; `uniform` holds a pixel's class where the 2 r + 1 columns round it agree.
  Pool(const RegionCrossEntropyParams& params, const Ring<Int>& labels, const Ring<Int>& uniform,
       const Ring<T>& values, int64_t classes)
      : p_(params), labels_(labels), uniform_(uniform), values_(values), classes_(classes) {
    int64_t rows = 1, taps = 1;
    for (int axis = 0; axis < 3; ++axis) {
      if (axis < 2) rows *= 2 * p_.radius[axis] + 1;
      taps *= 2 * p_.radius[axis] + 1;
    }
    rows_.reset(new Row[rows]);
    taps_.reset(new Tap[taps]);
    masked_.reset(new V[taps]);
    offsets_.reset(new int64_t[taps]);
    const int r = p_.radius[2];
    nested_ = r > 0;
    for (int axis = 0; axis < 2; ++axis) {
      if (axis == 1 && p_.size[1] == 1 && p_.radius[1] == 0) continue;
      nested_ = nested_ && p_.radius[axis] == r;
      for (int i = 0; nested_ && i <= r; ++i) nested_ = p_.axis_weight[axis][i] == p_.axis_weight[2][i];
    }
    for (int e = 0; e <= r; ++e)
      step_[e] = static_cast<T>(p_.axis_weight[2][e] - (e < r ? p_.axis_weight[2][e + 1] : 0));
  }

  // The window of the centres in row (d, h): rows that exist and, with `anchors`, hold anchors.
  void aim(int64_t d, int64_t h, bool anchors) {
    const int* r = p_.radius;
    row_count_ = tap_count_ = 0;
    double total = 0;
    for (int ring = 0; ring <= larger(r[0], r[1]); ++ring) {
      first_row_[ring] = row_count_;
      for (int64_t z = larger(0, d - r[0]); z <= smaller(p_.size[0] - 1, d + r[0]); ++z) {
        if (anchors && z % p_.stride[0] != 0) continue;
        for (int64_t y = larger(0, h - r[1]); y <= smaller(p_.size[1] - 1, h + r[1]); ++y) {
          if (anchors && y % p_.stride[1] != 0) continue;
          if (larger(std::abs(z - d), std::abs(y - h)) != ring) continue;
          const Row row{labels_.offset(z, y, labels_.box.begin[2]),
                        values_.offset(z, y, values_.box.begin[2])};
          rows_[row_count_++] = row;
          const double rows =
              std::fmin(p_.axis_weight[0][std::abs(z - d)], p_.axis_weight[1][std::abs(y - h)]);
          for (int64_t x = -r[2]; x <= r[2]; ++x) {
            const double w = std::fmin(rows, p_.axis_weight[2][std::abs(x)]);
            taps_[tap_count_++] = {row.label + x, row.value + x, static_cast<T>(w)};
            total += p_.normalize == RegionNormalize::count ? 1 : w;
          }
        }
      }
    }
    first_row_[larger(r[0], r[1]) + 1] = row_count_;
    whole_total_ = static_cast<T>(total);
  }

  // Sums of `count` centres, at most kSegment: class c goes to out + c * stride. The first centre is at
  // column `label_column` of the label ring and `value_column` of the value ring. Writes whole vectors.
  // `totals`, if not null, gets the normaliser of each centre.
  void run(const Int* own, int64_t label_column, int64_t value_column, int64_t count, T* out, int64_t stride,
           T* totals) {
    for (int64_t x = 0; x < count;) {
      const Kind kind = nested_ ? kind_of(own + x, label_column + x) : Kind::mixed;
      if (kind != Kind::whole) {
        if (kind == Kind::ignored)
          clear(out + x, stride, totals ? totals + x : nullptr);
        else
          mixed(S::load(own + x), label_column + x, value_column + x, out + x, stride,
                totals ? totals + x : nullptr);
        x += kLanes;
        continue;
      }
      const int64_t begin = x;
      do {
        if (totals) S::store(totals + x, S::fill(whole_total_));
        x += kLanes;
      } while (x < count && kind_of(own + x, label_column + x) == Kind::whole);
      whole(value_column + begin, x - begin, out + begin, stride);
    }
  }

  // Number of agreeing pixels of one vector of centres.
  V agreement(M own, int64_t label_column) {
    own = own < 0 ? S::fill_int(-2) : own;
    V total{};
    for (int64_t t = 0; t < tap_count_; ++t)
      total += S::masked(S::load(labels_.data + label_column + taps_[t].label) == own, S::fill(1));
    return total;
  }

 private:
  static constexpr int64_t kBlock = 4, kWidth = kSegment + 4 * kLanes;

  struct Row {
    int64_t label, value;  // offsets in the rings, to be added to a column
  };
  struct Tap {
    int64_t label, value;
    T weight;
  };
  enum class Kind { ignored, whole, mixed };

  DYNPLAN_INLINE Kind kind_of(const Int* own_row, int64_t label_column) const {
    const M own = S::load(own_row);
    if (S::all(own < 0)) return Kind::ignored;
    M same = own >= 0;
    for (int64_t i = 0; i < row_count_; ++i)
      same &= S::load(uniform_.data + label_column + rows_[i].label) == own;
    return S::all(same) ? Kind::whole : Kind::mixed;
  }

  void clear(T* out, int64_t stride, T* totals) const {
    for (int64_t c = 0; c < classes_; ++c) S::store(out + c * stride, V{});
    if (totals) S::store(totals, V{});
  }

  void mixed(M own, int64_t label_column, int64_t value_column, T* out, int64_t stride, T* totals) {
    // An ignored centre (-1) must not agree with ignored pixels.
    own = own < 0 ? S::fill_int(-2) : own;
    V total{};
    const bool by_count = p_.normalize == RegionNormalize::count;
    // Taps that no centre of the vector agrees with are dropped: in noisy maps most of them.
    int64_t taps = 0;
    for (int64_t t = 0; t < tap_count_; ++t) {
      const M same = S::load(labels_.data + label_column + taps_[t].label) == own;
      masked_[taps] = S::masked(same, S::fill(taps_[t].weight));
      offsets_[taps] = taps_[t].value;
      total += by_count ? S::masked(same, S::fill(1)) : masked_[taps];
      taps += S::bits(same) != 0;
    }
    if (totals) S::store(totals, total);
    const T* values = values_.data + value_column;
    for_class_blocks(classes_, [&]<int kClasses>(int64_t first) {
      V sums[kClasses] = {};
      const T* block = values + first * values_.class_stride;
      for (int64_t t = 0; t < taps; ++t) {
        const V w = masked_[t];
        const T* from = block + offsets_[t];
#pragma GCC unroll 8
        for (int k = 0; k < kClasses; ++k) sums[k] += w * S::load(from + k * values_.class_stride);
      }
#pragma GCC unroll 8
      for (int k = 0; k < kClasses; ++k) S::store(out + (first + k) * stride, sums[k]);
    });
  }

  void whole(int64_t column, int64_t count, T* out, int64_t stride) {
    switch (p_.radius[2]) {
      case 1:
        return nested<1>(column, count, out, stride);
      case 2:
        return nested<2>(column, count, out, stride);
      case 3:
        return nested<3>(column, count, out, stride);
      case 4:
        return nested<4>(column, count, out, stride);
      case 5:
        return nested<5>(column, count, out, stride);
      case 6:
        return nested<6>(column, count, out, stride);
      case 7:
        return nested<7>(column, count, out, stride);
    }
  }

  template <int kRadius>
  void nested(int64_t column, int64_t count, T* out, int64_t stride) {
    // A block of classes between writing column sums and reading them at other alignments, which cannot be
    // forwarded from the store buffer.
    for (int64_t c = 0; c < classes_; c += kBlock) {
      const int64_t end = smaller(classes_, c + kBlock);
      for (int64_t k = c; k < end; ++k)
        add_rows<kRadius>(values_.data + k * values_.class_stride, column, count, columns_[k - c][0]);
      for (int64_t k = c; k < end; ++k)
        add_columns<kRadius>(columns_[k - c][0], column, count, out + k * stride);
    }
  }

  // columns[e]: the sum over rows of what a column |offset| = e weighs, in vectors aligned with the ring,
  // from the one that holds the first column needed.
  template <int kRadius>
  DYNPLAN_INLINE void add_rows(const T* values, int64_t column, int64_t count, T* columns) const {
    const int64_t begin = (column - kRadius) / kLanes * kLanes, end = column + count + kRadius;
    if (row_count_ == 2 * kRadius + 1 && first_row_[1] == 1) {  // an image, inside
      const T* rows[2 * kRadius + 1];
      for (int i = 0; i <= 2 * kRadius; ++i) rows[i] = values + rows_[i].value;
      for (int64_t x = begin; x < end; x += kLanes) {
        V level[kRadius + 1];
        level[0] = S::load(rows[0] + x);
#pragma GCC unroll 7
        for (int e = 1; e <= kRadius; ++e)
          level[e] = level[e - 1] + (S::load(rows[2 * e - 1] + x) + S::load(rows[2 * e] + x));
        weigh<kRadius>(level, columns + (x - begin));
      }
      return;
    }
    for (int64_t x = begin; x < end; x += kLanes) {
      V level[kRadius + 1];
      V sum{};
      for (int e = 0; e <= kRadius; ++e) {
        for (int64_t i = first_row_[e]; i < first_row_[e + 1]; ++i)
          sum += S::load(values + rows_[i].value + x);
        level[e] = sum;
      }
      weigh<kRadius>(level, columns + (x - begin));
    }
  }

  template <int kRadius>
  DYNPLAN_INLINE void weigh(const V (&level)[kRadius + 1], T* columns) const {
    V weighted{};
#pragma GCC unroll 8
    for (int e = kRadius; e >= 0; --e) {
      weighted += step_[e] * level[e];
      S::store(columns + e * kWidth, weighted);
    }
  }

  template <int kRadius>
  DYNPLAN_INLINE static void add_columns(const T* columns, int64_t column, int64_t count, T* out) {
    const T* centre = columns + (column - (column - kRadius) / kLanes * kLanes);
    for (int64_t x = 0; x < count; x += kLanes) {
      V sum = S::load(centre + x);
#pragma GCC unroll 7
      for (int e = 1; e <= kRadius; ++e)
        sum += S::load(centre + e * kWidth + x - e) + S::load(centre + e * kWidth + x + e);
      S::store(out + x, sum);
    }
  }

  const RegionCrossEntropyParams& p_;
  const Ring<Int>&labels_, &uniform_;
  const Ring<T>& values_;
  int64_t classes_;
  std::unique_ptr<Row[]> rows_;  // by ring: those of ring e are [first_row_[e], first_row_[e + 1])
  std::unique_ptr<Tap[]> taps_;
  std::unique_ptr<V[]> masked_;         // weights of one vector of centres,
  std::unique_ptr<int64_t[]> offsets_;  // and where in the value ring they apply
  int64_t first_row_[kRegionMaxRadius + 2] = {};
  int64_t row_count_ = 0, tap_count_ = 0;
  T whole_total_ = 0;
  T step_[kRegionMaxRadius + 1] = {};
  bool nested_ = false;  // all axes have one radius and one set of weights
  alignas(64) T columns_[kBlock][kRegionMaxRadius + 1][kWidth];
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
