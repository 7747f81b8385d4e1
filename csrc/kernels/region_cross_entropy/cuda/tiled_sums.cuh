// Window sums of the tiled region_cross_entropy, the inner loop of its forward and its backward: see
// cuda/tiled.cuh.
#pragma once

#include "kernels/region_cross_entropy/cuda/tiled.cuh"

namespace dynplan::kernels {

namespace tiled {

__device__ __forceinline__ void read_quad(const float* address, float (&quad)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(address);
  quad[0] = v.x, quad[1] = v.y, quad[2] = v.z, quad[3] = v.w;
}

// sums[i] = sum over the window of centre i of w * value, over the taps of its mask. `tile` points at the
// thread's first window: row 0, column 0 is R above and kMargin left of its first centre.
template <int R>
__device__ __forceinline__ void masked_sums(const float* tile, int pitch, const Masks<R>& masks,
                                            const float (&ring)[R], float (&sums)[kCentres]) {
  using S = Shape<R>;
#pragma unroll
  for (int i = 0; i < kCentres; ++i) sums[i] = 0;
#pragma unroll
  for (int r = 0; r < kTall + 2 * R; ++r) {
    float value[S::kQuads][4];
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) read_quad(tile + r * pitch + 4 * q, value[q]);
    for_each_tap<R>(r, [&](int i, int column, int dy, int dx) {
      const int far = max(max(dy, -dy), max(dx, -dx));
      const float tap = value[(S::kMargin + column) / 4][(S::kMargin + column) % 4];
      if (masks.word[i][(dy + R) / S::kRowsPerWord] & row_bit<R>(dy, dx))
        sums[i] = far == 0 ? sums[i] + tap : fmaf(ring[far - 1], tap, sums[i]);  // w(0) = 1
    });
  }
}

// Sums of 2 * D + 1 neighbours for kWide neighbouring windows of values[0 .. kWide + 2 * D): what they share
// is added once.
template <int D>
__device__ __forceinline__ void sliding_sums(const float* values, float (&sums)[kWide]) {
  static_assert(kWide == 4);
  if constexpr (D == 0) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) sums[j] = values[j];
  } else {
    float left = values[1] + values[2], right = values[2 * D + 1] + values[2 * D + 2];
    if constexpr (D > 1) {
      float shared = values[3];
#pragma unroll
      for (int i = 4; i <= 2 * D; ++i) shared += values[i];
      left += shared, right += shared;
    }
    sums[0] = left + values[0], sums[1] = left + values[2 * D + 1];
    sums[2] = right + values[2], sums[3] = right + values[2 * D + 3];
  }
}

// Adds step[d] times the sums over the boxes of radius d, for d = D .. R.
template <int R, int D>
__device__ __forceinline__ void add_boxes(const float (&heights)[kTall][R + 1][kWide + 2 * R],
                                          const WindowWeights& weights, float (&sums)[kCentres]) {
#pragma unroll
  for (int u = 0; u < kTall; ++u) {
    float box[kWide];
    sliding_sums<D>(&heights[u][D][R - D], box);
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      sums[u * kWide + j] =
          D == 0 ? weights.step[D] * box[j] : fmaf(weights.step[D], box[j], sums[u * kWide + j]);
  }
  if constexpr (D < R) add_boxes<R, D + 1>(heights, weights, sums);
}

// The same where every tap counts, from the sums of nested boxes: 13.75 operations a window of 5 instead
// of 25.
template <int R>
__device__ __forceinline__ void nested_box_sums(const float* tile, int pitch, const WindowWeights& weights,
                                                float (&sums)[kCentres]) {
  using S = Shape<R>;
  static_assert(kTall == 2);
  float heights[kTall][R + 1][kWide + 2 * R];  // of centre row u: sum of 2 * d + 1 values of one column
#pragma unroll
  for (int q = 0; q < S::kQuads; ++q) {
    float value[kTall + 2 * R][4];
#pragma unroll
    for (int r = 0; r < kTall + 2 * R; ++r) read_quad(tile + r * pitch + 4 * q, value[r]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = 4 * q + c - (S::kMargin - R);
      if (column < 0 || column >= kWide + 2 * R) continue;
      heights[0][0][column] = value[R][c], heights[1][0][column] = value[R + 1][c];
      float shared = value[R][c] + value[R + 1][c];
#pragma unroll
      for (int d = 1; d <= R; ++d) {
        if (d > 1) shared += value[R - d + 1][c] + value[R + d][c];
        heights[0][d][column] = shared + value[R - d][c];
        heights[1][d][column] = shared + value[R + d + 1][c];
      }
    }
  }
  add_boxes<R, 0>(heights, weights, sums);
}

// Weights of the rings 1 .. R in registers: the compiler would fetch constants again for every tap that it
// predicates.
template <int R>
__device__ __forceinline__ void pin_ring(const WindowWeights& weights, float* shared, float (&ring)[R]) {
  if (threadIdx.x == 0)
#pragma unroll
    for (int d = 0; d < R; ++d) shared[d] = weights.ring[d + 1];
  __syncthreads();
#pragma unroll
  for (int d = 0; d < R; ++d) ring[d] = shared[d];
}

// `masks()` gives the thread's masks, where they are needed.
template <int R, typename GetMasks>
__device__ __forceinline__ void window_sums(const float* tile, int pitch, bool one_label,
                                            const float (&ring)[R], const WindowWeights& weights,
                                            GetMasks masks, float (&sums)[kCentres]) {
  if (one_label) {
    nested_box_sums<R>(tile, pitch, weights, sums);
  } else {
    masked_sums<R>(tile, pitch, masks(), ring, sums);
  }
}

__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

}  // namespace tiled
}  // namespace dynplan::kernels
