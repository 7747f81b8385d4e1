// Backward of merge = logits. A march of three stages, r planes apart: load logits; merge them again and turn
// each anchor's merged vector into its gradient g_q = s_q / Z_q * d l_q / d z_q; gather g over the windows
// that hold a pixel. Windows and agreement are symmetric, so every output is written once, in a fixed order.
#pragma once

#include "kernels/region_cross_entropy_forward.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Where rows of gradient can be written as they are made: dense rows of T.
template <class T>
struct DirectRows {
  T* base = nullptr;
  int64_t stride[4] = {}, class_stride = 0;

  DirectRows() = default;
  explicit DirectRows(const RegionCrossEntropyParams& p, const RegionCrossEntropyGrad& grad) {
    const bool same = p.logit == (sizeof(T) == 8 ? RegionLogit::f64 : RegionLogit::f32);
    if (!same || grad.grad_input_stride[4] != 1 || p.low[0] > 0) return;
    base = static_cast<T*>(grad.grad_input);
    stride[0] = grad.grad_input_stride[0];
    for (int axis = 1; axis < 4; ++axis) stride[axis] = grad.grad_input_stride[axis + 1];
    class_stride = grad.grad_input_stride[1];
  }
  T* at(int64_t n, int64_t d, int64_t h, int64_t w) const {
    return base + n * stride[0] + d * stride[1] + h * stride[2] + w * stride[3];
  }
};

// Slopes and logsumexps of a strip of anchors, by column from the first of the ring of anchors.
template <class T>
class SlopeRows {
 public:
  SlopeRows(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
            const RegionCrossEntropyGrad& grad)
      : p_(params), lse_(static_cast<const T*>(state.lse)), slopes_(params, state, grad) {}

  void reset(const Box& anchors) { rows_.reset(memory_, anchors.row(), 2, kRegionStrip); }

  T* slopes(int64_t i) { return rows_.data + i * rows_.plane_stride; }
  T* lse(int64_t i) { return slopes(i) + rows_.class_stride; }

  // Row (d, h), the i-th of its strip. Where there is no anchor slopes are 0, and logsumexps so large that
  // exponentials are finite.
  void load(int64_t i, int64_t n, int64_t d, int64_t h, const Box& anchors, bool with_lse) {
    std::memset(slopes(i), 0, rows_.class_stride * sizeof(T));
    const AnchorRow row(p_, n, d, h, larger(0, anchors.begin[2]), smaller(p_.size[2], anchors.end[2]));
    const int64_t first = row.first - anchors.begin[2];
    slopes_.row(p_, row, n, d, h, slopes(i) + first);
    if (!with_lse) return;
    for (int64_t x = 0; x < rows_.class_stride; ++x) lse(i)[x] = -kLowestLogit<T>;
    for (int64_t x = 0; x < row.count; ++x) lse(i)[first + x * row.step] = lse_[row.index + x];
  }

 private:
  const RegionCrossEntropyParams& p_;
  const T* lse_;
  AnchorSlopes<T> slopes_;
  Scratch<T> memory_;
  Ring<T> rows_;
};

// Anchors that windows of a box hold. Their ring has the columns of the logits', so that both pools read
// labels and values at one column.
inline Box anchor_box(const RegionCrossEntropyParams& p, const Box& box) {
  Box anchors = box.grown(p.radius, 1);
  anchors.begin[2] -= p.radius[2];
  anchors.end[2] += p.radius[2];
  return anchors;
}

template <class T>
class RegionBackward {
 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;

  RegionBackward(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
                 const RegionCrossEntropyGrad& grad)
      : p_(params),
        strip_(Pool<T>::strip(params)),
        weights_(params),
        slopes_(params, state, grad),
        planes_(params),
        merge_(params, planes_.labels, planes_.logits, params.classes),
        gather_(params, planes_.labels, anchors_, params.classes),
        merged_(params.classes) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    const int64_t strip = Pool<T>::strip(p);
    return (2 * p.radius[0] + strip + planes_between(p, strip)) * p.classes * static_cast<int64_t>(sizeof(T));
  }

  // Calls store(d, h, first column, row, class_stride) for the rows of the box, in ascending order of d,
  // except for the columns that `direct`, where rows of T can be written in place, has received.
  template <class Store>
  void run(int64_t n, const Box& box, const DirectRows<T>& direct, Store store) {
    const int64_t between = planes_between(p_, strip_);
    planes_.reset(box, 2, between + p_.radius[0], 2 * p_.radius[0] + strip_);
    anchors_.reset(anchor_memory_, anchor_box(p_, box), p_.classes, between);
    slopes_.reset(anchors_.box);
    row_.reset(row_memory_, box.row(), p_.classes, kRegionStrip);
    march_backward(
        p_, box, strip_, [&](int64_t d) { planes_.load(n, d); },
        [&](int64_t d, int64_t h, int64_t count) { anchor_rows(n, d, h, count, box); },
        [&](int64_t d, int64_t h, int64_t count) {
          const int64_t written = gather_rows(n, d, h, count, box, direct);
          for (int64_t i = 0; i < count && written < box.extent(2); ++i)
            store(d + i, h, box.begin[2] + written, row_.data + i * row_.plane_stride + written,
                  row_.class_stride);
        });
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);

  void anchor_rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box) {
    const int64_t radius = p_.radius[2], begin = box.begin[2] - radius, width = box.extent(2) + 2 * radius;
    for (int64_t i = 0; i < count; ++i) slopes_.load(i, n, d + i, h, anchors_.box, /*with_lse=*/true);
    merge_.aim(d, h, count, /*anchors=*/false);
    for (int64_t x = 0; x < width; x += kRegionSegment) {
      const int64_t columns = smaller(kRegionSegment, width - x);
      merged_.pool(merge_, radius + x, columns);
      for (int64_t i = 0; i < count; ++i) {
        const Int* own_row = planes_.labels.at(d + i, h, begin + x);
        const T *slopes = slopes_.slopes(i) + radius + x, *lse = slopes_.lse(i) + radius + x;
        T* out = anchors_.at(d + i, h, begin + x);
        for (int64_t j = 0; j < columns; j += S::lanes) {
          if (j % kLine == 0 && p_.low[0] == 0)
            prefetch_logits(p_, n, d + p_.radius[0] + strip_ + i, h, larger(0, begin) + x + j);
          const int64_t at = i * kRegionSegment + j;
          vector(S::load(own_row + j), S::load(merged_.totals + at), S::load(slopes + j), S::load(lse + j),
                 merged_.sums.get() + at, out + j);
        }
      }
    }
  }

  // Gradients of one vector of anchors from its sums.
  DYNPLAN_INLINE void vector(M own, V total, V slope, V lse, const T* merged, T* out) const {
    const M valid = own >= 0;
    const V scale = S::masked(valid, T(1) / (valid ? total : S::fill(1)));
    const V share = slope * scale;
    V hard = share * weights_.hard;
    if (weights_.weight)
      for (int lane = 0; lane < S::lanes; ++lane) hard[lane] *= weights_.of(own[lane]);
    const V mass = hard + share * weights_.soft_sum;
    const int64_t stride = anchors_.class_stride;
    for (int64_t c = 0; c < p_.classes; ++c)
      S::store(out + c * stride,
               mass * S::exp(S::load(merged + c * MergedBlock<T>::kClassStride) * scale - lse));
    if (const Int label = own[0]; label >= 0 && S::all(own == label)) {
      S::store(out + label * stride, S::load(out + label * stride) - hard);
    } else {
      for (int lane = 0; lane < S::lanes; ++lane)
        if (own[lane] >= 0) out[own[lane] * stride + lane] -= hard[lane];
    }
    if (weights_.soft > 0)
      for (int64_t c = 0; c < p_.classes; ++c)
        S::store(out + c * stride, S::load(out + c * stride) - share * (weights_.soft * weights_.at(c)));
  }

  // Whole vectors of the rows go to `direct` where it can take them, the others to row_. Returns how many
  // columns went to `direct`.
  int64_t gather_rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box,
                      const DirectRows<T>& direct) {
    const int64_t width = box.extent(2), direct_columns = direct.base ? width / S::lanes * S::lanes : 0;
    gather_.aim(d, h, count, /*anchors=*/true);
    for (int64_t x = 0; x < width;) {
      const bool in_place = x < direct_columns;
      const int64_t columns = smaller(kRegionSegment, (in_place ? direct_columns : width) - x);
      BlockOutput<T> out{{}, in_place ? direct.class_stride : row_.class_stride};
      for (int64_t i = 0; i < count; ++i)
        out.row[i] =
            in_place ? direct.at(n, d + i, h, box.begin[2] + x) : row_.data + i * row_.plane_stride + x;
      gather_.run(2 * p_.radius[2] + x, columns, out, nullptr);
      x += columns;
    }
    return direct_columns;
  }

  const RegionCrossEntropyParams& p_;
  int64_t strip_;
  ClassWeights<T> weights_;
  SlopeRows<T> slopes_;
  Planes<T> planes_;
  Ring<T> anchors_;  // g_q
  Ring<T> row_;      // a strip of gradient
  Scratch<T> anchor_memory_, row_memory_;
  Pool<T> merge_, gather_;
  MergedBlock<T> merged_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
