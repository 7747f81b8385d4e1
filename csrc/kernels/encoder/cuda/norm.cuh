// Bias, residual, layer norm and scatter in one pass, on CUDA:
//
//   out[out_row(i), :] = LayerNorm(product[i, :] + bias + residual[residual_row(i), :]),  i < counts[1]
//
// and row(i) = rows[i], or i where rows is null. Arithmetic in fp32; the variance is the mean square about
// the mean, of the row held in registers. One warp a row, sums in a fixed order; rows that the dispatch does
// not name are not touched, which is what keeps bypassed rows bit for bit.
#pragma once

#include "kernels/cuda/mma.cuh"
#include "kernels/encoder/cuda/kernels.h"

namespace dynplan::kernels::cuda {

template <class T>
struct ResidualNormParams {
  const T* product;  // (capacity, width)
  const T* bias;
  const T* residual;
  const int32_t* residual_rows;  // (capacity,) or null
  const T* norm_weight;
  const T* norm_bias;
  T* out;
  const int32_t* out_rows;  // (capacity,) or null
  const int32_t* counts;    // (2,): active samples, active rows
  int64_t capacity;         // bounds counts[1] and what the row maps hold
  int32_t width;            // a multiple of 8, at most kMaxWidth
  float eps;
};

constexpr int kNormThreads = 128;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// kMine: numbers of a row that one lane holds.
template <class T, int kMine>
__global__ void __launch_bounds__(kNormThreads, kMine <= 32 ? 4 : 2)
    residual_norm_kernel(const __grid_constant__ ResidualNormParams<T> p) {
  constexpr int kSize = Vector<T>::kSize;
  const int lane = threadIdx.x % 32;
  const int32_t count = static_cast<int32_t>(min(int64_t{p.counts[1]}, p.capacity));
  const int32_t warps = static_cast<int32_t>(gridDim.x) * (kNormThreads / 32);
  for (int32_t i = blockIdx.x * (kNormThreads / 32) + threadIdx.x / 32; i < count; i += warps) {
    const T* const product = p.product + static_cast<int64_t>(i) * p.width;
    const int64_t residual_row = p.residual_rows ? p.residual_rows[i] : i;
    const int64_t out_row = p.out_rows ? p.out_rows[i] : i;
    DYNPLAN_DEVICE_ASSERT(residual_row >= 0 && residual_row < p.capacity && out_row >= 0 &&
                          out_row < p.capacity);
    const T* const residual = p.residual + residual_row * p.width;
    T* const out = p.out + out_row * p.width;

    float row[kMine / kSize][kSize];
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kMine / kSize; ++v) {
      const int32_t column = (v * 32 + lane) * kSize;
      Vector<T> a = {}, b = {}, c = {};
      if (column < p.width) {
        a = load_vector(product + column);
        b = load_vector(residual + column);
        c = load_vector(p.bias + column);
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        row[v][e] = widen(a.values[e]) + widen(c.values[e]) + widen(b.values[e]);
        sum += row[v][e];
      }
    }
    const float mean = warp_sum(sum) / p.width;
    float squares = 0;
#pragma unroll
    for (int v = 0; v < kMine / kSize; ++v)
      if ((v * 32 + lane) * kSize < p.width) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) squares += (row[v][e] - mean) * (row[v][e] - mean);
      }
    const float scale = rsqrtf(warp_sum(squares) / p.width + p.eps);
#pragma unroll
    for (int v = 0; v < kMine / kSize; ++v) {
      const int32_t column = (v * 32 + lane) * kSize;
      if (column >= p.width) continue;
      const Vector<T> weight = load_vector(p.norm_weight + column), bias = load_vector(p.norm_bias + column);
      Vector<T> result;
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        result.values[e] =
            narrow<T>((row[v][e] - mean) * scale * widen(weight.values[e]) + widen(bias.values[e]));
      store_vector(out + column, result);
    }
  }
}

template <class T>
cudaError_t launch_residual_norm(const ResidualNormParams<T>& p, int multiprocessors, cudaStream_t stream) {
  // Sixteen blocks of four warps fill a multiprocessor; the loop in the kernel takes the rest.
  const int64_t blocks = min(ceil_div(p.capacity, int64_t{kNormThreads / 32}), int64_t{multiprocessors} * 16);
  const auto start = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kNormThreads), 0, stream, p);
  };
  if (p.width <= 512) return start(residual_norm_kernel<T, 16>);
  if (p.width <= 1024) return start(residual_norm_kernel<T, 32>);
  return start(residual_norm_kernel<T, kMaxWidth / 32>);
}

}  // namespace dynplan::kernels::cuda
