// Forward of the tiled region_cross_entropy: see cuda/tiled.cuh.
//
// Per centre and class, beside the window sum: z in base 2, its distance to a reference that is raised only
// when z exceeds it by 2^60, one ex2 and one add. The label's own class is kept out of the sum, so that l =
// log1p(sum over the others of exp(z_c - z_y)) keeps its digits where the label wins clearly.
#pragma once

#include "kernels/region_cross_entropy/cuda/tiled_sums.cuh"

namespace dynplan::kernels {

namespace tiled {

// Sum over the classes but the label's of 2^(z_c - reference), and z of the label's class; z in base 2.
struct OnlineSum {
  float reference = -1e30f;  // finite, so that logits of -inf give 0 and not NaN
  float sum = 0;
  float label_z = 0;
};

// exp2 of 60 above the reference, times any number of classes, is far from fp32's largest.
constexpr float kRaiseReference = 60.0f;

// z of class c is sums[i] * scale[i]. It is multiplied out where it is kept: z - reference has lost its
// digits when the reference is that of no class yet.
__device__ __forceinline__ void add_class(const float (&sums)[kCentres], const float (&scale)[kCentres],
                                          const int32_t (&label)[kCentres], int32_t c,
                                          OnlineSum (&online)[kCentres]) {
  float above[kCentres];
  bool raise = false;
#pragma unroll
  for (int i = 0; i < kCentres; ++i) {
    above[i] = fmaf(sums[i], scale[i], -online[i].reference);
    raise |= above[i] > kRaiseReference;
  }
  if (raise) {
#pragma unroll
    for (int i = 0; i < kCentres; ++i)
      if (above[i] > kRaiseReference) {
        online[i].sum *= exp2_fast(-above[i]);
        online[i].reference = sums[i] * scale[i];
        above[i] = 0;
      }
  }
#pragma unroll
  for (int i = 0; i < kCentres; ++i) {
    if (c == label[i]) {
      online[i].label_z = sums[i] * scale[i];
    } else {
      online[i].sum += exp2_fast(above[i]);
    }
  }
}

template <typename T, int R, bool kSmoothing>
__global__ void __launch_bounds__(kThreads, R <= 2 && !kSmoothing ? 2 : 1)
    region_forward_kernel(const __grid_constant__ RegionCrossEntropyParams p,
                          const __grid_constant__ RegionCrossEntropyState state,
                          const __grid_constant__ WindowWeights weights, RegionPartial* partials, int tiles_x,
                          int tiles_y, bool in_pairs) {
  using S = Shape<R>;
  __shared__ float scratch[32];
  float* tiles = dynamic_shared<float>();
  const Thread thread;
  const Place at = place_of(tiles_x, tiles_y, kTileX, kTileY);
  Start<T, R> start(p, weights, at, thread, in_pairs, tiles);
  auto& [loader, masks, label, one_label] = start;
  __syncthreads();
  loader.store(tiles);
  float ring[R];
  pin_ring<R>(weights, scratch, ring);

  float scale[kCentres];
#pragma unroll
  for (int i = 0; i < kCentres; ++i)
    scale[i] = kLog2e * inverse_normalizer<R>(masks, i, weights, p.normalize == RegionNormalize::count);

  OnlineSum online[kCentres];
  float smoothed[kSmoothing ? kCentres : 1] = {};
  const int32_t classes = static_cast<int32_t>(p.classes);
  for (int32_t c = 0; c < classes; ++c) {
    const float* tile = tiles + (c & 1) * S::kTileFloats;
    if (c + 1 < classes) loader.fetch();
    float sums[kCentres];
    window_sums<R>(
        tile + thread.y * S::kPitch + thread.x, S::kPitch, one_label, ring, weights, [&] { return masks; },
        sums);
    if constexpr (kSmoothing) {
      const float weight = region_class_weight<float>(p, c);
#pragma unroll
      for (int i = 0; i < kCentres; ++i) smoothed[i] = fmaf(weight, sums[i] * scale[i], smoothed[i]);
    }
    add_class(sums, scale, label, c, online);
    if (c + 1 < classes) loader.store(tiles + (~c & 1) * S::kTileFloats);
    __syncthreads();
  }

  const float epsilon = static_cast<float>(p.label_smoothing);
  const float total_weight = kSmoothing ? region_total_weight<float>(p) : 0;
  float loss[kCentres];
  bool valid[kCentres];
  float normalizer = 0;
#pragma unroll
  for (int i = 0; i < kCentres; ++i) {
    const int64_t x = at.left + thread.x + i % kWide, y = at.top + thread.y + i / kWide;
    valid[i] = label[i] >= 0;
    const OnlineSum& o = online[i];
    const float plain = region_softplus(kLn2 * (o.reference + log2f(o.sum) - o.label_z));
    const float lse = valid[i] ? kLn2 * o.label_z + plain : 0;
    const float weight = valid[i] ? region_class_weight<float>(p, label[i]) : 0;
    loss[i] = valid[i] ? weight * plain : 0;
    if constexpr (kSmoothing)
      if (valid[i])
        loss[i] = (1 - epsilon) * loss[i] +
                  epsilon / static_cast<float>(classes) * (total_weight * lse - kLn2 * smoothed[i]);
    if (loss[i] < 0) loss[i] = 0;  // by rounding, where there is one class
    if (valid[i]) normalizer += region_power(weight, p.p);
    if (x >= p.size[2] || y >= p.size[1]) continue;
    const int64_t anchor = (at.n * p.size[1] + y) * p.size[2] + x;
    static_cast<float*>(state.losses)[anchor] = loss[i];
    static_cast<float*>(state.lse)[anchor] = lse;
    if (state.agreement) state.agreement[anchor] = static_cast<int16_t>(agreeing<R>(masks, i));
  }
  region_block_partial(loss, valid, kCentres, normalizer, p.p, scratch, partials + blockIdx.x);
}

}  // namespace tiled
}  // namespace dynplan::kernels
