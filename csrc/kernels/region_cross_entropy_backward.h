// Backward of merge = logits. A march of three stages, r planes apart: load logits; merge them again and turn
// each anchor's merged vector into its gradient g_q = s_q / Z_q * d l_q / d z_q; gather g over the windows
// that hold a pixel. Windows and agreement are symmetric, so every output is written once, in a fixed order.
#pragma once

#include "kernels/region_cross_entropy_forward.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// s_q = d value / d l_q * grad_value + grad_losses_q for rows of anchors.
template <class T>
class AnchorSlopes {
 public:
  using S = Simd<T>;

  AnchorSlopes(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
               const RegionCrossEntropyGrad& grad)
      : grad_(grad), losses_(static_cast<const T*>(state.losses)), exponent_(static_cast<T>(p.p - 1)) {
    const double upstream =
        grad.grad_value ? static_cast<double>(*static_cast<const T*>(grad.grad_value)) : 0;
    const double value = static_cast<double>(*static_cast<const T*>(state.value));
    if (p.reduction == RegionReduction::sum) {
      common_ = static_cast<T>(upstream);
      return;
    }
    common_ = static_cast<T>(*state.normalizer > 0 ? upstream / *state.normalizer : 0);
    // 0 / 0 = 0: a batch without loss has no gradient.
    inverse_ = value < static_cast<double>(std::numeric_limits<T>::min()) ? T(0) : static_cast<T>(1 / value);
  }

  // Writes slopes[i * row.step]; (n, d, h) only place grad_losses.
  void row(const RegionCrossEntropyParams& p, const AnchorRow& row, int64_t n, int64_t d, int64_t h,
           T* slopes) {
    for (int64_t i = 0; i < row.count; i += S::lanes) {
      const int64_t here = smaller(S::lanes, row.count - i);
      typename S::V l{};
      std::memcpy(&l, losses_ + row.index + i, here * sizeof(T));
      const typename S::V s = common_ * S::pow(l * inverse_, exponent_);
      if (row.step == 1)
        std::memcpy(slopes + i, &s, here * sizeof(T));
      else
        for (int64_t lane = 0; lane < here; ++lane) slopes[(i + lane) * row.step] = s[lane];
    }
    if (!grad_.grad_losses) return;
    const int64_t* stride = grad_.grad_losses_stride;
    const T* upstream = static_cast<const T*>(grad_.grad_losses) + n * stride[0] +
                        d / p.stride[0] * stride[1] + h / p.stride[1] * stride[2] +
                        row.first / row.step * stride[3];
    for (int64_t i = 0; i < row.count; ++i) slopes[i * row.step] += upstream[i * stride[3]];
  }

 private:
  const RegionCrossEntropyGrad& grad_;
  const T* losses_;
  T exponent_, common_ = 0, inverse_ = 0;
};

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
    return base ? base + n * stride[0] + d * stride[1] + h * stride[2] + w * stride[3] : nullptr;
  }
};

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
        lse_(static_cast<const T*>(state.lse)),
        weights_(params),
        slopes_(params, state, grad),
        planes_(params),
        merge_(params, planes_.labels, planes_.uniform, planes_.logits, params.classes),
        gather_(params, planes_.labels, planes_.uniform, anchors_, params.classes),
        merged_(new T[params.classes * kSegment]) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return 2 * (2 * p.radius[0] + 1) * p.classes * static_cast<int64_t>(sizeof(T));
  }

  // Calls store(d, h, first column, row, class_stride) for the rows of the box, in ascending order of d,
  // except for the columns that `direct`, where rows of T can be written in place, has received.
  template <class Store>
  void run(int64_t n, const Box& box, const DirectRows<T>& direct, Store store) {
    const int r = p_.radius[0];
    planes_.reset(box, 2);
    anchors_.reset(anchor_memory_, box.grown(p_.radius, 1), p_.classes, 2 * r + 1);
    row_.reset(row_memory_, anchors_.box.row(), larger(2, p_.classes), 1);
    for (int64_t d = box.begin[0] - 2 * r; d < box.begin[0]; ++d) planes_.load(n, d);
    for (int64_t q = box.begin[0] - r; q < box.end[0] + r; ++q) {
      planes_.load(n, q + r);
      if (q >= 0 && q < p_.size[0] && q % p_.stride[0] == 0)
        for (int64_t h = larger(0, anchors_.box.begin[1]); h < smaller(p_.size[1], anchors_.box.end[1]); ++h)
          if (h % p_.stride[1] == 0) anchor_row(n, q, h);
      const int64_t d = q - r;
      if (d < box.begin[0]) continue;
      for (int64_t h = box.begin[1]; h < box.end[1]; ++h) {
        const int64_t written = gather_row(d, h, box, direct.at(n, d, h, box.begin[2]), direct.class_stride);
        if (written < box.extent(2))
          store(d, h, box.begin[2] + written, row_.data + written, row_.class_stride);
      }
    }
  }

 private:
  static constexpr int64_t kSegment = Pool<T>::kSegment, kLine = 64 / sizeof(T);

  void anchor_row(int64_t n, int64_t d, int64_t h) {
    const Box& box = anchors_.box;
    const Ring<Int>& labels = planes_.labels;
    const int64_t margin = box.begin[2] - labels.box.begin[2], width = box.extent(2);
    T *slopes = row_.data, *lse = slopes + row_.class_stride;
    for (int64_t x = 0; x < row_.class_stride; ++x) {
      slopes[x] = 0;
      lse[x] = -kLowestLogit<T>;  // where there is no anchor the exponential must be finite
    }
    const AnchorRow row(p_, n, d, h, larger(0, box.begin[2]), smaller(p_.size[2], box.end[2]));
    const int64_t first = row.first - box.begin[2];
    slopes_.row(p_, row, n, d, h, slopes + first);
    for (int64_t i = 0; i < row.count; ++i) lse[first + i * row.step] = lse_[row.index + i];
    merge_.aim(d, h, /*anchors=*/false);
    const Int* own_row = labels.at(d, h, box.begin[2]);
    T* out = anchors_.at(d, h, box.begin[2]);
    for (int64_t x = 0; x < width; x += kSegment) {
      const int64_t count = smaller(kSegment, width - x);
      merge_.run(own_row + x, margin + x, margin + x, count, merged_.get(), kSegment, totals_);
      for (int64_t i = 0; i < count; i += S::lanes) {
        if (i % kLine == 0 && p_.low[0] == 0)
          prefetch_logits(p_, n, d + p_.radius[0] + 1, h, larger(0, box.begin[2]) + x + i);
        vector(S::load(own_row + x + i), S::load(totals_ + i), S::load(slopes + x + i), S::load(lse + x + i),
               merged_.get() + i, out + x + i);
      }
    }
  }

  // Gradients of one vector of anchors from its sums, class c at merged + c * kSegment.
  DYNPLAN_INLINE void vector(M own, V total, V slope, V lse, const T* merged, T* out) const {
    const M valid = own >= 0;
    const V scale = S::masked(valid, T(1) / (valid ? total : S::fill(1)));
    const V share = slope * scale;
    V hard = share * weights_.hard;
    if (weights_.weight)
      for (int lane = 0; lane < S::lanes; ++lane) hard[lane] *= weights_.of(own[lane]);
    const V mass = hard + share * weights_.soft_sum;
    for (int64_t c = 0; c < p_.classes; ++c) {
      const V z = S::load(merged + c * kSegment) * scale;
      V g = mass * S::exp(z - lse) - S::masked(own == static_cast<Int>(c), hard);
      if (weights_.soft > 0) g -= share * (weights_.soft * weights_.at(c));
      S::store(out + c * anchors_.class_stride, g);
    }
  }

  // Whole vectors of the row go to `direct` where that is not null, the others to row_. Returns how many
  // columns went to `direct`.
  int64_t gather_row(int64_t d, int64_t h, const Box& box, T* direct, int64_t direct_stride) {
    const int64_t margin = box.begin[2] - anchors_.box.begin[2], width = box.extent(2);
    const int64_t direct_columns = direct ? width / S::lanes * S::lanes : 0;
    const Int* own_row = planes_.labels.at(d, h, box.begin[2]);
    gather_.aim(d, h, /*anchors=*/true);
    for (int64_t x = 0; x < width;) {
      const bool in_place = x < direct_columns;
      const int64_t count = smaller(kSegment, (in_place ? direct_columns : width) - x);
      gather_.run(own_row + x, 2 * margin + x, margin + x, count, (in_place ? direct : row_.data) + x,
                  in_place ? direct_stride : row_.class_stride, nullptr);
      x += count;
    }
    return direct_columns;
  }

  const RegionCrossEntropyParams& p_;
  const T* lse_;
  ClassWeights<T> weights_;
  AnchorSlopes<T> slopes_;
  Planes<T> planes_;
  Ring<T> anchors_;  // g_q
  Ring<T> row_;      // one row of slopes and logsumexps, then of gradient
  Scratch<T> anchor_memory_, row_memory_;
  Pool<T> merge_, gather_;
  std::unique_ptr<T[]> merged_;  // sums of one segment
  alignas(64) T totals_[kSegment];
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
