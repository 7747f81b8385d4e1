// Forward of merge = logits: (losses, lse) per anchor, agreement, and the sums of the Minkowski mean.
// Included per instruction set. Logits are read once (plus halos); nothing else of their size is written.
#pragma once

#include "kernels/region_cross_entropy_pool.h"
#include "kernels/region_cross_entropy_upsampled.h"

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
  T of(int64_t label) const { return label < 0 ? T(0) : weight ? weight[label] : T(1); }
  double power(int64_t label) const {
    return label < 0 ? 0 : weight ? std::pow(static_cast<double>(weight[label]), p) : 1;
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
  using S = Simd<T>;
  PowerSum row;
  typename S::V top{};
  const int64_t whole = count / S::lanes * S::lanes;
  for (int64_t i = 0; i < whole; i += S::lanes) top = S::max(top, S::load(losses + i));
  T largest = 0;
  for (int lane = 0; lane < S::lanes; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  for (int64_t i = whole; i < count; ++i) largest = losses[i] > largest ? losses[i] : largest;
  const T scale = largest > 0 ? 1 / largest : 0;
  typename S::V sums{};
  for (int64_t i = 0; i < count; i += S::lanes) {
    typename S::V l{};
    std::memcpy(&l, losses + i, smaller(S::lanes, count - i) * sizeof(T));
    sums += S::pow(l * scale, static_cast<T>(weights.p));
  }
  row.largest = largest;
  for (int lane = 0; lane < S::lanes; ++lane) row.sum += sums[lane];
  for (int64_t i = 0; i < count; ++i) row.normalizer += weights.power(labels[i * step]);
  total.merge(row, weights.p);
}

// Planes of labels and of logits, loaded as the march reaches them.
template <class T>
struct Planes {
  using S = Simd<T>;
  using Int = typename S::Int;

  const RegionCrossEntropyParams& p;
  LabelRows<T> label_rows;
  Interpolation<T> interpolation;
  Scratch<Int> label_memory, uniform_memory;
  Scratch<T> logit_memory;
  Ring<Int> labels, uniform;  // uniform: the label where the 2 r + 1 columns round a pixel share it, or -1
  Ring<T> logits;

  explicit Planes(const RegionCrossEntropyParams& params)
      : p(params), label_rows(params), interpolation(params) {}

  // `halo`: radii that the values of a tile reach beyond it.
  void reset(const Box& box, int halo) {
    const Box region = box.grown(p.radius, halo);
    labels.reset(label_memory, region, 1, (halo + 1) * p.radius[0] + 1);
    uniform.reset(uniform_memory, region, 1, labels.planes);
    logits.reset(logit_memory, region, p.classes, 2 * p.radius[0] + 1);
    std::memset(labels.data, 0xff,
                labels.plane_stride * labels.planes * sizeof(Int));  // -1 outside the image
    std::memset(uniform.data, 0xff, uniform.plane_stride * uniform.planes * sizeof(Int));
  }

  void load(int64_t n, int64_t d) {
    if (d < 0 || d >= p.size[0]) return;
    const Box& box = logits.box;
    const int64_t begin = larger(0, box.begin[2]), end = smaller(p.size[2], box.end[2]);
    for (int64_t h = larger(0, box.begin[1]); h < smaller(p.size[1], box.end[1]); ++h) {
      label_rows.load(n, d, h, begin, end, labels.at(d, h, begin));
      mark_uniform(labels.at(d, h, box.begin[2]), uniform.at(d, h, box.begin[2]));
      if (interpolation.enabled())
        interpolation.load(n, d, begin, end, logits.at(d, h, begin), logits.class_stride);
      else
        load_logits(p, n, d, h, begin, end, logits.at(d, h, begin), logits.class_stride);
    }
  }

  void mark_uniform(const Int* row, Int* out) const {
    const int r = p.radius[2];
    for (int64_t x = r; x + r < labels.class_stride - S::lanes; x += S::lanes) {
      const typename S::M own = S::load(row + x);
      typename S::M same = own == own;
      for (int i = 1; i <= r; ++i) same &= (S::load(row + x - i) == own) & (S::load(row + x + i) == own);
      const typename S::M kept = same ? own : S::fill_int(-1);
      std::memcpy(out + x, &kept, sizeof kept);
    }
  }
};

template <class T>
class RegionForward {
 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;

  RegionForward(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state)
      : p_(params),
        state_(state),
        weights_(params),
        planes_(params),
        pool_(params, planes_.labels, planes_.uniform, planes_.logits, params.classes),
        merged_(new T[params.classes * kSegment]) {}

  static int64_t bytes_per_column(const RegionCrossEntropyParams& p) {
    return (2 * p.radius[0] + 1) * p.classes * static_cast<int64_t>(sizeof(T));
  }

  PowerSum run(int64_t n, const Box& box) {
    PowerSum total;
    planes_.reset(box, 1);
    row_.reset(row_memory_, box.row(), 3, 1);
    for (int64_t d = box.begin[0] - p_.radius[0]; d < box.begin[0] + p_.radius[0]; ++d) planes_.load(n, d);
    for (int64_t d = box.begin[0]; d < box.end[0]; ++d) {
      planes_.load(n, d + p_.radius[0]);
      if (d % p_.stride[0] != 0) continue;
      for (int64_t h = box.begin[1]; h < box.end[1]; ++h)
        if (h % p_.stride[1] == 0) row(n, d, h, box, total);
    }
    return total;
  }

  const RegionBadLabel& bad() const { return planes_.label_rows.bad(); }

 private:
  static constexpr int64_t kSegment = Pool<T>::kSegment, kLine = 64 / sizeof(T);

  void row(int64_t n, int64_t d, int64_t h, const Box& box, PowerSum& total) {
    const Ring<Int>& labels = planes_.labels;
    const int64_t margin = box.begin[2] - labels.box.begin[2];
    const Int* own_row = labels.at(d, h, box.begin[2]);
    T *losses = row_.data, *lse = losses + row_.class_stride, *agreement = lse + row_.class_stride;
    pool_.aim(d, h, /*anchors=*/false);
    for (int64_t x = 0; x < box.extent(2); x += kSegment) {
      const int64_t count = smaller(kSegment, box.extent(2) - x);
      pool_.run(own_row + x, margin + x, margin + x, count, merged_.get(), kSegment, totals_);
      for (int64_t i = 0; i < count; i += S::lanes) {
        if (i % kLine == 0 && p_.low[0] == 0)
          prefetch_logits(p_, n, d + p_.radius[0] + 1, h, box.begin[2] + x + i);
        const M own = S::load(own_row + x + i);
        if (state_.agreement) S::store(agreement + x + i, pool_.agreement(own, margin + x + i));
        vector(own, S::load(totals_ + i), merged_.get() + i, losses + x + i, lse + x + i);
      }
    }
    const AnchorRow anchors(p_, n, d, h, box.begin[2], box.end[2]);
    T* losses_out = static_cast<T*>(state_.losses) + anchors.index;
    T* lse_out = static_cast<T*>(state_.lse) + anchors.index;
    const int64_t first = anchors.first - box.begin[2];
    for (int64_t i = 0; i < anchors.count; ++i) {
      losses_out[i] = losses[first + i * anchors.step];
      lse_out[i] = lse[first + i * anchors.step];
      if (state_.agreement)
        state_.agreement[anchors.index + i] = static_cast<int16_t>(agreement[first + i * anchors.step]);
    }
    add_row(total, losses_out, anchors.count, own_row + first, anchors.step, weights_);
  }

  // Loss and logsumexp of one vector of centres from its sums, class c at merged + c * kSegment.
  DYNPLAN_INLINE void vector(M own, V total_weight, const T* merged, T* losses, T* lse) {
    const M valid = own >= 0;
    const V scale = S::masked(valid, T(1) / (valid ? total_weight : S::fill(1)));
    V top = S::fill(-std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < p_.classes; ++c) top = S::max(S::load(merged + c * kSegment), top);
    top *= scale;
    // The label's own term is left out of the sum, so that the small losses of pixels that are clearly right
    // keep their digits.
    V others{}, label_logit{};
    for (int64_t c = 0; c < p_.classes; ++c) {
      const V z = S::load(merged + c * kSegment) * scale;
      const M hit = own == static_cast<Int>(c);
      others += S::unmasked(hit, S::exp(z - top));
      label_logit = hit ? z : label_logit;
    }
    const V gap = S::log1p(others + (S::exp(label_logit - top) - T(1)));
    const V logsumexp = top + gap;
    V loss = (top - label_logit) + gap;
    if (weights_.weight || weights_.soft > 0) {
      V weight;
      for (int lane = 0; lane < S::lanes; ++lane) weight[lane] = weights_.of(own[lane]);
      loss = weights_.hard * weight * loss;
      V soft{};
      for (int64_t c = 0; weights_.soft > 0 && c < p_.classes; ++c)
        soft += weights_.at(c) * (logsumexp - S::load(merged + c * kSegment) * scale);
      loss += weights_.soft * soft;
    }
    S::store(losses, S::masked(valid, loss));
    S::store(lse, S::masked(valid, logsumexp));
  }

  const RegionCrossEntropyParams& p_;
  const RegionCrossEntropyState& state_;
  ClassWeights<T> weights_;
  Planes<T> planes_;
  Pool<T> pool_;
  Scratch<T> row_memory_;
  Ring<T> row_;
  std::unique_ptr<T[]> merged_;  // sums of one segment
  alignas(64) T totals_[kSegment];
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
