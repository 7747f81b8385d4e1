// Forward of region_cross_entropy for every option: 1 to 3 axes, any window, stride and layout, fp64, merge
// of probabilities, logits interpolated as they are read. Formulas: region_cross_entropy.h.
//
// One thread per anchor, which walks over its window once for every kClassesAtOnce classes and reads from
// global memory; neighbours' windows overlap, so most reads hit L1. Right first: the tiled kernels are the
// fast path.
#pragma once

#include <limits>

#include "kernels/region_cross_entropy/cuda/common.cuh"

namespace dynplan::kernels {

namespace general {

constexpr int kThreads = 256;
constexpr int kClassesAtOnce = 4;

struct Place {
  int64_t n, at[3];
};

__device__ __forceinline__ Place place_of(int64_t index, const int64_t* extent) {
  Place place;
  for (int axis = 2; axis >= 0; --axis) {
    place.at[axis] = index % extent[axis];
    index /= extent[axis];
  }
  place.n = index;
  return place;
}

// Index of a pixel in maps (N, D, H, W).
__device__ __forceinline__ int64_t pixel_index(const RegionCrossEntropyParams& p, int64_t n, int64_t d,
                                               int64_t h, int64_t w) {
  return ((n * p.size[0] + d) * p.size[1] + h) * p.size[2] + w;
}

__device__ __forceinline__ int32_t label_at(const RegionCrossEntropyParams& p, int64_t n, int64_t d,
                                            int64_t h, int64_t w) {
  return region_label(
      p, n * p.target_stride[0] + d * p.target_stride[1] + h * p.target_stride[2] + w * p.target_stride[3]);
}

// ---- logits
// --------------------------------------------------------------------------------------------------------

// The two low-resolution neighbours of a full-resolution coordinate, as torch.nn.functional.interpolate has
// them.
template <typename Acc>
struct Neighbours {
  int64_t near, far;
  Acc far_weight;

  __device__ Neighbours(int64_t at, int64_t low, int64_t full, bool align_corners) {
    Acc source;
    if (align_corners) {
      source =
          full > 1 ? static_cast<Acc>(at) * (static_cast<Acc>(low - 1) / static_cast<Acc>(full - 1)) : Acc(0);
    } else {
      source =
          (static_cast<Acc>(at) + Acc(0.5)) * (static_cast<Acc>(low) / static_cast<Acc>(full)) - Acc(0.5);
      source = source < 0 ? Acc(0) : source;
    }
    near = min(static_cast<int64_t>(source), low - 1);
    far = min(near + 1, low - 1);
    far_weight = source - static_cast<Acc>(near);
  }
};

// The logits of one pixel, read class by class.
template <typename T, bool kUpsampled>
class PixelLogits {
 public:
  using Acc = Wide<T>;

  __device__ PixelLogits(const RegionCrossEntropyParams& p, int64_t n, int64_t d, int64_t h, int64_t w)
      : class_stride_(p.input_stride[1]) {
    const T* image = static_cast<const T*>(p.input) + n * p.input_stride[0];
    if constexpr (kUpsampled) {
      const Neighbours<Acc> y(h, p.input_size[0], p.size[1], p.align_corners),
          x(w, p.input_size[1], p.size[2], p.align_corners);
      const auto corner = [&](int64_t row, int64_t column) {
        return image + row * p.input_stride[3] + column * p.input_stride[4];
      };
      corner_[0] = corner(y.near, x.near), corner_[1] = corner(y.near, x.far);
      corner_[2] = corner(y.far, x.near), corner_[3] = corner(y.far, x.far);
      down_ = y.far_weight, right_ = x.far_weight;
    } else {
      corner_[0] = image + d * p.input_stride[2] + h * p.input_stride[3] + w * p.input_stride[4];
    }
  }

  __device__ Acc operator()(int64_t c) const {
    const int64_t offset = c * class_stride_;
    if constexpr (kUpsampled) {
      const Acc top = (1 - right_) * widen(corner_[0][offset]) + right_ * widen(corner_[1][offset]);
      const Acc bottom = (1 - right_) * widen(corner_[2][offset]) + right_ * widen(corner_[3][offset]);
      return (1 - down_) * top + down_ * bottom;
    } else {
      return widen(corner_[0][offset]);
    }
  }

 private:
  int64_t class_stride_;
  const T* corner_[kUpsampled ? 4 : 1];
  Acc down_ = 0, right_ = 0;
};

// ---- windows
// -------------------------------------------------------------------------------------------------------

// Calls visit(d, h, w, weight) for the pixels of the window round `at` that have label `label`.
template <typename Acc, typename Visit>
__device__ __forceinline__ void for_each_agreeing(const RegionCrossEntropyParams& p, int64_t n,
                                                  const int64_t* at, int32_t label, Visit visit) {
  const auto first = [&](int axis) { return max(at[axis] - p.radius[axis], int64_t{0}); };
  const auto last = [&](int axis) { return min(at[axis] + p.radius[axis], p.size[axis] - 1); };
  const auto weight = [&](int axis, int64_t here) {
    const int64_t offset = here - at[axis];
    return p.axis_weight[axis][offset < 0 ? -offset : offset];
  };
  for (int64_t d = first(0); d <= last(0); ++d)
    for (int64_t h = first(1); h <= last(1); ++h)
      for (int64_t w = first(2); w <= last(2); ++w)
        if (label_at(p, n, d, h, w) == label)
          visit(d, h, w, static_cast<Acc>(min(min(weight(0, d), weight(1, h)), weight(2, w))));
}

// Probabilities are kept away from 0, so that their logarithms stay finite.
template <typename Acc>
__device__ __forceinline__ Acc floored_probability(Acc logit, Acc lse) {
  const Acc probability = exp(logit - lse);
  constexpr Acc kSmallest = std::numeric_limits<Acc>::min();
  return probability < kSmallest ? kSmallest : probability;
}

template <typename Acc, int kClasses>
struct Window {
  Acc z[kClasses] = {};  // merged values of classes first .. first + kClasses - 1
  Acc normalizer = 0;    // Z
  int agreement = 0;

  // Of logits, or of probabilities where `lse` gives the logsumexp of every pixel. Ends with z divided by Z.
  template <typename T, bool kUpsampled>
  __device__ void merge(const RegionCrossEntropyParams& p, int64_t n, const int64_t* at, int32_t label,
                        int64_t first, const Acc* lse = nullptr) {
    const bool by_count = p.normalize == RegionNormalize::count;
    for_each_agreeing<Acc>(p, n, at, label, [&](int64_t d, int64_t h, int64_t w, Acc weight) {
      const PixelLogits<T, kUpsampled> logits(p, n, d, h, w);
      const Acc pixel_lse = lse ? lse[pixel_index(p, n, d, h, w)] : Acc(0);
#pragma unroll
      for (int i = 0; i < kClasses; ++i)
        if (first + i < p.classes) {
          const Acc logit = logits(first + i);
          z[i] += weight * (lse ? floored_probability(logit, pixel_lse) : logit);
        }
      normalizer += by_count ? Acc(1) : weight;
      ++agreement;
    });
#pragma unroll
    for (int i = 0; i < kClasses; ++i) z[i] /= normalizer;
  }
};

// What -log of class c's probability counts in the loss of an anchor with label `label`.
template <typename Acc>
__device__ __forceinline__ Acc target_share(const RegionCrossEntropyParams& p, int64_t c, int32_t label) {
  const Acc smoothing = static_cast<Acc>(p.label_smoothing);
  return region_class_weight<Acc>(p, c) *
         (smoothing / static_cast<Acc>(p.classes) + (c == label ? 1 - smoothing : Acc(0)));
}

// ---- kernels
// -------------------------------------------------------------------------------------------------------

// Loss and lse of one anchor, merge of logits. The label's class is kept out of the sum:
// region_cross_entropy_tiled _forward.cuh says why.
template <typename T, bool kUpsampled>
__device__ __forceinline__ int logits_loss(const RegionCrossEntropyParams& p, int64_t n, const int64_t* at,
                                           int32_t label, Wide<T>& loss, Wide<T>& lse) {
  using Acc = Wide<T>;
  Acc reference = -1e30f, sum = 0, label_z = 0, smoothed = 0;
  int agreement = 0;
  for (int64_t first = 0; first < p.classes; first += kClassesAtOnce) {
    Window<Acc, kClassesAtOnce> window;
    window.template merge<T, kUpsampled>(p, n, at, label, first);
    agreement = window.agreement;
#pragma unroll
    for (int i = 0; i < kClassesAtOnce; ++i) {
      if (first + i >= p.classes) continue;
      const Acc z = window.z[i];
      smoothed += region_class_weight<Acc>(p, first + i) * z;
      if (first + i == label) {
        label_z = z;
        continue;
      }
      if (z > reference) {
        sum *= exp(reference - z);
        reference = z;
      }
      sum += exp(z - reference);
    }
  }
  const Acc plain = region_softplus(reference + log(sum) - label_z);
  const Acc epsilon = static_cast<Acc>(p.label_smoothing);
  lse = label_z + plain;
  loss = region_class_weight<Acc>(p, label) * plain;
  if (epsilon > 0)
    loss = (1 - epsilon) * loss +
           epsilon / static_cast<Acc>(p.classes) * (region_total_weight<Acc>(p) * lse - smoothed);
  if (loss < 0) loss = 0;  // by rounding, where there is one class
  return agreement;
}

// Loss of one anchor, merge of probabilities; lse holds logsumexp of every pixel. Without label smoothing
// only the label's probability counts.
template <typename T, bool kUpsampled>
__device__ __forceinline__ int probs_loss(const RegionCrossEntropyParams& p, int64_t n, const int64_t* at,
                                          int32_t label, const Wide<T>* lse, Wide<T>& loss) {
  using Acc = Wide<T>;
  const bool smoothed = p.label_smoothing > 0;
  const int64_t last = smoothed ? p.classes - 1 : label;
  int agreement = 0;
  loss = 0;
  // One class at a time, so that smoothing takes no registers from the rest.
  for (int64_t c = smoothed ? 0 : label; c <= last; ++c) {
    Window<Acc, 1> window;
    window.template merge<T, kUpsampled>(p, n, at, label, c, lse);
    agreement = window.agreement;
    // By count a merged probability may be less than any of those in it. (NaN stays NaN.)
    constexpr Acc kSmallest = std::numeric_limits<Acc>::min();
    loss -= target_share<Acc>(p, c, label) * log(window.z[0] < kSmallest ? kSmallest : window.z[0]);
  }
  return agreement;
}

template <typename T, bool kUpsampled>
__global__ void __launch_bounds__(kThreads)
    region_pixel_lse_kernel(const __grid_constant__ RegionCrossEntropyParams p, Wide<T>* lse,
                            int64_t pixels) {
  using Acc = Wide<T>;
  const int64_t pixel = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (pixel >= pixels) return;
  const Place place = place_of(pixel, p.size);
  const PixelLogits<T, kUpsampled> logits(p, place.n, place.at[0], place.at[1], place.at[2]);
  Acc reference = -1e30f, sum = 0;
  for (int64_t c = 0; c < p.classes; ++c) {
    const Acc x = logits(c);
    if (x > reference) {
      sum *= exp(reference - x);
      reference = x;
    }
    sum += exp(x - reference);
  }
  lse[pixel] = reference + log(sum);
}

template <typename T, bool kUpsampled>
__global__ void __launch_bounds__(kThreads)
    region_general_forward_kernel(const __grid_constant__ RegionCrossEntropyParams p,
                                  const __grid_constant__ RegionCrossEntropyState state,
                                  RegionPartial* partials, int64_t anchors) {
  using Acc = Wide<T>;
  __shared__ Acc scratch[32];
  const int64_t anchor = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const bool probs = p.merge == RegionMerge::probs;
  Acc loss = 0, normalizer = 0;
  bool valid = false;
  if (anchor < anchors) {
    const Place place = place_of(anchor, p.anchors);
    const int64_t at[3] = {place.at[0] * p.stride[0], place.at[1] * p.stride[1], place.at[2] * p.stride[2]};
    const int32_t label = label_at(p, place.n, at[0], at[1], at[2]);
    valid = label >= 0;
    Acc lse = 0;
    int agreement = 0;
    if (valid && probs)
      agreement = probs_loss<T, kUpsampled>(p, place.n, at, label, static_cast<const Acc*>(state.lse), loss);
    if (valid && !probs) agreement = logits_loss<T, kUpsampled>(p, place.n, at, label, loss, lse);
    if (valid) normalizer = region_power(region_class_weight<Acc>(p, label), p.p);
    static_cast<Acc*>(state.losses)[anchor] = loss;
    if (!probs) static_cast<Acc*>(state.lse)[anchor] = lse;
    if (state.agreement) state.agreement[anchor] = static_cast<int16_t>(agreement);
  }
  region_block_partial(&loss, &valid, 1, normalizer, p.p, scratch, partials + blockIdx.x);
}

}  // namespace general
}  // namespace dynplan::kernels
