// What forward and backward, and both merges, share about anchors: their places, weights, sums and slopes.
#pragma once

#include "kernels/region_cross_entropy/geometry.h"
#include "kernels/region_cross_entropy/rows.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// largest^p * sum = sum of l^p, so that no power overflows or vanishes; merged in a fixed order.
struct PowerSum {
  double largest = 0, sum = 0, normalizer = 0;

  void merge(const PowerSum& other, double p) {
    normalizer += other.normalizer;
    if (other.largest > largest) {
      sum = sum * std::pow(largest / other.largest, p) + other.sum;
      largest = other.largest;
    } else if (other.largest > 0) {
      sum += other.sum * std::pow(other.largest / largest, p);
    } else {
      sum += other.sum;  // 0, or NaN
    }
  }

  double value(const RegionCrossEntropyParams& p) const {
    if (p.reduction == RegionReduction::sum) return largest * sum;
    return normalizer > 0 ? largest * std::pow(sum / normalizer, 1 / p.p) : 0 * sum;
  }
};

// Class weights and what the formulas take from them. Without weights every weight is 1.
template <class T>
struct ClassWeights {
  const T* weight;
  T hard, soft;  // l = hard * weight[y] * (lse - z_y) + soft * sum_c weight[c] (lse - z_c)
  T soft_sum;    // soft * sum of weights
  double p;

  explicit ClassWeights(const RegionCrossEntropyParams& params)
      : weight(static_cast<const T*>(params.class_weight)),
        hard(static_cast<T>(1 - params.label_smoothing)),
        soft(static_cast<T>(params.label_smoothing / static_cast<double>(larger(1, params.classes)))),
        p(params.p) {
    double sum = weight ? 0 : static_cast<double>(params.classes);
    for (int64_t c = 0; weight && c < params.classes; ++c) sum += weight[c];
    soft_sum = static_cast<T>(params.label_smoothing / static_cast<double>(larger(1, params.classes)) * sum);
  }

  T at(int64_t c) const { return weight ? weight[c] : T(1); }
  // Of a vector of labels; 0 where they are ignored.
  template <class S>
  DYNPLAN_INLINE typename S::V of(typename S::M labels) const {
    typename S::V v{};
    for (int lane = 0; lane < S::lanes; ++lane)
      if (labels[lane] >= 0) v[lane] = at(labels[lane]);
    return v;
  }
  // Sum of weight^p over a row's labels, every step-th.
  template <class Int>
  double powers(const Int* labels, int64_t count, int64_t step) const {
    if (!weight) {
      Int valid = 0;
      if (step == 1)
        for (int64_t i = 0; i < count; ++i) valid += labels[i] >= 0;
      else
        for (int64_t i = 0; i < count; ++i) valid += labels[i * step] >= 0;
      return static_cast<double>(valid);
    }
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
      if (const Int label = labels[i * step]; label >= 0)
        sum += std::pow(static_cast<double>(weight[label]), p);
    return sum;
  }
};

// The anchors of one row of pixels [begin, end): every stride-th, and their place in the maps of State.
struct AnchorRow {
  int64_t first, count, step, index;

  AnchorRow(const RegionCrossEntropyParams& p, int64_t n, int64_t d, int64_t h, int64_t begin, int64_t end)
      : first(ceil_div(begin, p.stride[2]) * p.stride[2]),
        count(larger(0, ceil_div(end - first, p.stride[2]))),
        step(p.stride[2]),
        index(((n * p.anchors[0] + d / p.stride[0]) * p.anchors[1] + h / p.stride[1]) * p.anchors[2] +
              first / p.stride[2]) {}
};

// Adds a row of anchor losses, and their labels' share of the normaliser.
template <class T, class Int>
void add_row(PowerSum& total, const T* losses, int64_t count, const Int* labels, int64_t step,
             const ClassWeights<T>& weights) {
  using S = Simd<T, kWideBytes>;
  PowerSum row;
  typename S::V top{};
  const int64_t whole = count / S::lanes * S::lanes;
  for (int64_t i = 0; i < whole; i += S::lanes) top = S::max(top, S::load(losses + i));
  T largest = 0;
  for (int lane = 0; lane < S::lanes; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  for (int64_t i = whole; i < count; ++i) largest = losses[i] > largest ? losses[i] : largest;
  const T scale = largest > 0 ? 1 / largest : 0;
  typename S::V sums{};
  for (int64_t i = 0; i < count; i += S::lanes)
    sums += S::pow(S::load_first(losses + i, count - i) * scale, static_cast<T>(weights.p));
  row.largest = largest;
  for (int lane = 0; lane < S::lanes; ++lane) row.sum += sums[lane];
  row.normalizer = weights.powers(labels, count, step);
  total.merge(row, weights.p);
}

// s_q = d value / d l_q * grad_value + grad_losses_q for rows of anchors.
template <class T>
class AnchorSlopes {
 public:
  using S = Simd<T>;

  AnchorSlopes(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
               const RegionCrossEntropyGrad& grad)
      : grad_(grad), losses_(static_cast<const T*>(state.losses)), exponent_(static_cast<T>(p.p - 1)) {
    if (!grad.grad_value) return;  // slopes are grad_losses, whatever the mean
    const double upstream = static_cast<double>(*static_cast<const T*>(grad.grad_value));
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
      const typename S::V l = S::load_first(losses_ + row.index + i, here);
      const typename S::V s = common_ * S::pow(l * inverse_, exponent_);
      if (row.step == 1 && here == S::lanes)
        S::store(slopes + i, s);
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

}  // namespace dynplan::kernels::DYNPLAN_ISA
