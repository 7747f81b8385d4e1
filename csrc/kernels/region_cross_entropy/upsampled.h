// Bilinear interpolation inside region_cross_entropy_upsampled: rows of logits are interpolated as they are
// read, rows of gradient folded back as they are made, so that neither exists at full resolution. The
// positions are those of torch.nn.functional.interpolate(mode="bilinear"). Images are marched: axis 0 is
// height.
#pragma once

#include "kernels/region_cross_entropy/geometry.h"
#include "kernels/region_cross_entropy/rows.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// full[x] = low[at[x]] (1 - up[x]) + low[at[x] + 1] up[x]; up is 0 where at is the last.
template <class T>
struct InterpolationAxis {
  std::unique_ptr<int64_t[]> at, start;  // start[j]: first x with at[x] >= j, for j in -1..size, offset by 1
  std::unique_ptr<T[]> up;

  void plan(int64_t full, int64_t low, bool align_corners) {
    at.reset(new int64_t[larger(1, full)]);
    up.reset(new T[larger(1, full)]);
    start.reset(new int64_t[low + 2]);
    const double ratio = !align_corners ? static_cast<double>(low) / static_cast<double>(full)
                         : full > 1     ? static_cast<double>(low - 1) / static_cast<double>(full - 1)
                                        : 0;
    for (int64_t x = 0; x < full; ++x) {
      const double position = align_corners ? static_cast<double>(x) * ratio
                                            : std::fmax(0.0, (static_cast<double>(x) + 0.5) * ratio - 0.5);
      at[x] = smaller(static_cast<int64_t>(position), low - 1);
      up[x] = at[x] == low - 1 ? T(0) : static_cast<T>(position - static_cast<double>(at[x]));
    }
    int64_t x = 0;
    for (int64_t j = -1; j <= low; ++j) {
      while (x < full && at[x] < j) ++x;
      start[j + 1] = x;
    }
  }

  // Pixels x with at[x] == j are [first(j), first(j + 1)).
  int64_t first(int64_t j) const { return start[j + 1]; }
};

template <class T>
class Interpolation {
 public:
  explicit Interpolation(const RegionCrossEntropyParams& params) : p_(params) {
    if (!enabled()) return;
    y_.plan(p_.size[0], p_.input_size[0], p_.align_corners);
    x_.plan(p_.size[2], p_.input_size[1], p_.align_corners);
    rows_.reset(new T[2 * p_.input_size[1]]);
  }

  bool enabled() const { return p_.input_size[0] > 0; }
  const InterpolationAxis<T>& y() const { return y_; }
  const InterpolationAxis<T>& x() const { return x_; }

  // Columns [begin, end) of row d of all classes.
  void load(int64_t n, int64_t d, int64_t begin, int64_t end, T* out, int64_t class_stride) {
    if (begin >= end) return;
    const int64_t low = y_.at[d], next = smaller(low + 1, p_.input_size[0] - 1);
    const int64_t first = x_.at[begin], last = smaller(x_.at[end - 1] + 2, p_.input_size[1]);
    T *above = rows_.get() - first, *below = above + p_.input_size[1];
    for (int64_t c = 0; c < p_.classes; ++c) {
      load_class(n, c, low, first, last, above + first);
      load_class(n, c, next, first, last, below + first);
      for (int64_t j = first; j < last; ++j) above[j] += y_.up[d] * (below[j] - above[j]);
      T* to = out + c * class_stride;
      for (int64_t x = begin; x < end; ++x) {
        const T left = above[x_.at[x]];
        const T right = above[smaller(x_.at[x] + 1, p_.input_size[1] - 1)];
        to[x - begin] = left + x_.up[x] * (right - left);
      }
    }
  }

 private:
  void load_class(int64_t n, int64_t c, int64_t row, int64_t first, int64_t last, T* out) const {
    RegionCrossEntropyParams one = p_;
    one.classes = 1;
    with_logit_type<T>(p_.logit, [&](auto type) {
      one.input = static_cast<const decltype(type)*>(p_.input) + c * p_.input_stride[1];
    });
    load_logits(one, n, row, 0, first, last, out, 0);
  }

  const RegionCrossEntropyParams& p_;
  InterpolationAxis<T> y_, x_;
  std::unique_ptr<T[]> rows_;
};

// Folds rows of full-resolution gradient, which come in ascending order, into the low-resolution rows of a
// box.
template <class T>
class UpsampledGradient {
 public:
  UpsampledGradient(const RegionCrossEntropyParams& params, const RegionCrossEntropyGrad& grad)
      : p_(params), grad_(grad), interpolation_(params) {}

  // Pixels that a box of low-resolution pixels takes gradient from.
  Box support(const Box& low) const {
    Box full{{0, 0, 0}, {0, 1, 0}};
    full.begin[0] = interpolation_.y().first(low.begin[0] - 1);
    full.end[0] = interpolation_.y().first(low.end[0]);
    full.begin[2] = interpolation_.x().first(low.begin[2] - 1);
    full.end[2] = interpolation_.x().first(low.end[2]);
    return full;
  }

  void begin(int64_t n, const Box& low) {
    n_ = n;
    low_ = low;
    full_ = support(low);
    next_ = low.begin[0];
    rows_.reset(row_memory_, full_, p_.classes, 2);
    std::memset(rows_.data, 0, 2 * rows_.plane_stride * sizeof(T));
    folded_.reset(folded_memory_, low.row(), p_.classes, 1);
  }

  void add(int64_t d, const T* gradient, int64_t class_stride) {
    const int64_t row = interpolation_.y().at[d];
    const T up = interpolation_.y().up[d];
    while (next_ < row) finish_row();
    if (row >= low_.begin[0]) add_scaled(row, 1 - up, gradient, class_stride);
    if (row + 1 >= low_.begin[0] && row + 1 < low_.end[0] && up > 0)
      add_scaled(row + 1, up, gradient, class_stride);
  }

  void finish() {
    while (next_ < low_.end[0]) finish_row();
  }

 private:
  void add_scaled(int64_t row, T scale, const T* gradient, int64_t class_stride) {
    T* sum = rows_.data + row % 2 * rows_.plane_stride;
    for (int64_t c = 0; c < p_.classes; ++c)
      for (int64_t x = 0; x < full_.extent(2); ++x)
        sum[c * rows_.class_stride + x] += scale * gradient[c * class_stride + x];
  }

  // Row next_ is complete: fold its columns and write it.
  void finish_row() {
    const InterpolationAxis<T>& axis = interpolation_.x();
    T* sum = rows_.data + next_ % 2 * rows_.plane_stride;
    for (int64_t c = 0; c < p_.classes; ++c) {
      const T* full = sum + c * rows_.class_stride - full_.begin[2];
      T* low = folded_.data + c * folded_.class_stride - low_.begin[2];
      for (int64_t j = low_.begin[2]; j < low_.end[2]; ++j) {
        T total = 0;
        for (int64_t x = axis.first(j - 1); x < axis.first(j); ++x) total += axis.up[x] * full[x];
        for (int64_t x = axis.first(j); x < axis.first(j + 1); ++x) total += (1 - axis.up[x]) * full[x];
        low[j] = total;
      }
    }
    store_gradient(p_, grad_, n_, next_, 0, low_.begin[2], low_.end[2], folded_.data, folded_.class_stride);
    std::memset(sum, 0, rows_.plane_stride * sizeof(T));
    ++next_;
  }

  const RegionCrossEntropyParams& p_;
  const RegionCrossEntropyGrad& grad_;
  Interpolation<T> interpolation_;
  int64_t n_ = 0, next_ = 0;
  Box low_{}, full_{};
  Scratch<T> row_memory_, folded_memory_;
  Ring<T> rows_, folded_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
