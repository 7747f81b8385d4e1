// What the CUDA kernels of region_cross_entropy share: reading logits and labels, and the Minkowski
// reduction. Formulas: region_cross_entropy.h. Kernels: cuda/tiled.cuh (2-D, stride 1,
// windows of 3, 5 and 7) and cuda/general.cuh (the rest).
//
// The reduction is in two stages of fixed order, without atomics: every block of a forward kernel leaves one
// RegionPartial, and one block merges them. So the same input gives the same bits, and nothing is read by the
// host.
//
// A label that is neither a class nor ignored is a device-side assertion, as in PyTorch's own losses.
#pragma once

#include <cmath>

#include "kernels/cuda/numbers.cuh"
#include "kernels/region_cross_entropy/params.h"

namespace dynplan::kernels {

// Label of the pixel at `offset` elements, -1 where it is ignored.
__device__ __forceinline__ int32_t region_label(const RegionCrossEntropyParams& p, int64_t offset) {
  int64_t label = 0;
  switch (p.label) {
    case RegionLabel::u8:
      label = static_cast<const uint8_t*>(p.target)[offset];
      break;
    case RegionLabel::i8:
      label = static_cast<const int8_t*>(p.target)[offset];
      break;
    case RegionLabel::i16:
      label = static_cast<const int16_t*>(p.target)[offset];
      break;
    case RegionLabel::i32:
      label = static_cast<const int32_t*>(p.target)[offset];
      break;
    case RegionLabel::i64:
      label = static_cast<const int64_t*>(p.target)[offset];
      break;
  }
  for (int i = 0; i < p.num_ignored; ++i)
    if (label == p.ignored[i]) return -1;
  DYNPLAN_DEVICE_ASSERT(label >= 0 && label < p.classes);
  return static_cast<int32_t>(label);
}

template <typename Acc>
__device__ __forceinline__ Acc region_class_weight(const RegionCrossEntropyParams& p, int64_t label) {
  return p.class_weight ? static_cast<const Acc*>(p.class_weight)[label] : Acc(1);
}

// Sum of all class weights, for label smoothing.
template <typename Acc>
__device__ __forceinline__ Acc region_total_weight(const RegionCrossEntropyParams& p) {
  if (!p.class_weight) return static_cast<Acc>(p.classes);
  Acc total = 0;
  for (int64_t c = 0; c < p.classes; ++c) total += region_class_weight<Acc>(p, c);
  return total;
}

// base^exponent; the exponents that people use take a handful of products.
template <typename Acc>
__device__ __forceinline__ Acc region_power(Acc base, double exponent) {
  const int whole = static_cast<int>(exponent);
  if (whole == exponent && whole <= 16) {
    Acc result = 1;
    for (int bits = whole; bits != 0; bits >>= 1, base *= base)
      if (bits & 1) result *= base;
    return result;
  }
  return pow(base, static_cast<Acc>(exponent));
}

// log(1 + exp(t)) without overflow, exact for small results.
template <typename Acc>
__device__ __forceinline__ Acc region_softplus(Acc t) {
  return t > 0 ? t + log1p(exp(-t)) : log1p(exp(t));
}

// ---- Minkowski reduction
// -------------------------------------------------------------------------------------------

// Anchors of one block: sum l^p = largest^p * scaled.
struct RegionPartial {
  double largest;
  double scaled;
  double normalizer;  // sum of weight[label]^p over valid anchors
};

// (l / largest)^p; an infinite loss gives an infinite mean, and a NaN stays one.
template <typename Acc>
__device__ __forceinline__ Acc region_scaled_power(Acc loss, Acc largest, double p) {
  if (largest == 0) return loss;  // 0, or NaN
  return region_power(loss == largest ? Acc(1) : loss / largest, p);
}

// One value of each thread of the block, in a fixed order; `scratch` holds 32. All threads get the result.
template <typename Acc, typename Combine>
__device__ __forceinline__ Acc region_block_reduce(Acc value, Acc* scratch, Combine combine) {
  for (int distance = 16; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kFullWarp, value, distance));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; ++warp) value = combine(value, scratch[warp]);
  __syncthreads();
  return value;
}

// Each thread brings `count` losses of valid anchors and the sum of their weights^p.
template <typename Acc>
__device__ __forceinline__ void region_block_partial(const Acc* losses, const bool* valid, int count,
                                                     Acc normalizer, double p, Acc* scratch,
                                                     RegionPartial* partial) {
  const auto add = [](Acc a, Acc b) { return a + b; };
  Acc largest = 0;
  for (int i = 0; i < count; ++i)
    if (valid[i]) largest = max(largest, losses[i]);
  largest = region_block_reduce(largest, scratch, [](Acc a, Acc b) { return max(a, b); });
  Acc scaled = 0;
  for (int i = 0; i < count; ++i)
    if (valid[i]) scaled += region_scaled_power(losses[i], largest, p);
  scaled = region_block_reduce(scaled, scratch, add);
  normalizer = region_block_reduce(normalizer, scratch, add);
  if (threadIdx.x == 0) *partial = {largest, scaled, normalizer};
}

constexpr int kRegionReduceThreads = 512;

template <typename Acc>
__global__ void __launch_bounds__(kRegionReduceThreads)
    region_reduce_kernel(const RegionPartial* partials, int64_t count, double p, RegionReduction reduction,
                         Acc* value, double* normalizer) {
  __shared__ double scratch[32];
  const auto add = [](double a, double b) { return a + b; };
  double largest = 0, scaled = 0, total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kRegionReduceThreads)
    largest = max(largest, partials[i].largest);
  largest = region_block_reduce(largest, scratch, [](double a, double b) { return max(a, b); });
  for (int64_t i = threadIdx.x; i < count; i += kRegionReduceThreads) {
    scaled += partials[i].largest == 0
                  ? partials[i].scaled
                  : partials[i].scaled * region_scaled_power(partials[i].largest, largest, p);
    total += partials[i].normalizer;
  }
  scaled = region_block_reduce(scaled, scratch, add);
  total = region_block_reduce(total, scratch, add);
  if (threadIdx.x != 0) return;
  *normalizer = total;
  const double mean = reduction == RegionReduction::sum ? scaled : pow(scaled / total, 1 / p);
  // scaled is 0 where no loss is positive, and NaN where one is.
  *value = static_cast<Acc>(scaled == 0 ? 0.0 : largest == 0 ? scaled : largest * mean);
}

template <typename Acc>
cudaError_t region_reduce(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                          const RegionPartial* partials, int64_t count, cudaStream_t stream) {
  return launch(region_reduce_kernel<Acc>, dim3(1), dim3(kRegionReduceThreads), 0, stream, partials, count,
                p.p, p.reduction, static_cast<Acc*>(state.value), state.normalizer);
}

// ---- backward
// ------------------------------------------------------------------------------------------------------

// s_q of region_cross_entropy.h's contract without grad_losses: grad_value * d value / d l_q.
template <typename Acc>
struct RegionAnchorScale {
  Acc grad_value, value, exponent;
  Acc inverse_normalizer;
  bool mean;

  __device__ RegionAnchorScale(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                               const RegionCrossEntropyGrad& grad)
      : grad_value(grad.grad_value ? *static_cast<const Acc*>(grad.grad_value) : Acc(0)),
        value(*static_cast<const Acc*>(state.value)),
        exponent(static_cast<Acc>(p.p - 1)),
        inverse_normalizer(static_cast<Acc>(1 / *state.normalizer)),
        mean(grad.grad_value && p.reduction == RegionReduction::mean) {}  // else it does not matter

  __device__ Acc operator()(Acc loss) const {
    if (!mean) return grad_value;
    if (value == 0 && exponent != 0) return 0;  // 0/0: every loss is 0
    return grad_value * region_power(loss == value ? Acc(1) : loss / value, exponent) * inverse_normalizer;
  }
};

template <typename Acc>
__device__ __forceinline__ Acc region_grad_loss(const RegionCrossEntropyGrad& grad, int64_t n, int64_t d,
                                                int64_t h, int64_t w) {
  if (!grad.grad_losses) return 0;
  return static_cast<const Acc*>(
      grad.grad_losses)[n * grad.grad_losses_stride[0] + d * grad.grad_losses_stride[1] +
                        h * grad.grad_losses_stride[2] + w * grad.grad_losses_stride[3]];
}

}  // namespace dynplan::kernels
