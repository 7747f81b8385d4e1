// One conditional encoder layer as seven launches on one stream (contract: encoder/cuda/kernels.h).
//
//   qkv      = hidden[rows] Wqkv^T + b                    product, rows gathered by its load
//   context  = attention(qkv) inside each active sample
//   branch   = context Wo^T                               product
//   x1       = LayerNorm(branch + bo + hidden[rows])
//   up       = act(x1 W1^T + b1)                          product
//   branch   = up W2^T                                    product
//   hidden[rows] = LayerNorm(branch + b2 + x1)            the only write to hidden
//
// Compact buffers hold one row per active row, in the order of `rows`. Grids follow the capacity; the number
// of active rows is read on the device alone, so that one captured graph serves every plan.
#pragma once

#include "kernels/encoder/cuda/attention.cuh"
#include "kernels/encoder/cuda/kernels.h"
#include "kernels/encoder/cuda/norm.cuh"
#include "kernels/encoder/cuda/product.cuh"

namespace dynplan::kernels::cuda {

// Pointers into the parameters laid end to end, in the order of EncoderLayerWeights.
template <class T>
struct EncoderLayerWeights {
  const T *qkv_weight, *qkv_bias, *output_weight, *output_bias, *norm1_weight, *norm1_bias;
  const T *up_weight, *up_bias, *down_weight, *down_bias, *norm2_weight, *norm2_bias;

  EncoderLayerWeights(const T* packed, int64_t width, int64_t intermediate) {
    const auto take = [&](int64_t size) {
      const T* const begin = packed;
      packed += size;
      return begin;
    };
    qkv_weight = take(3 * width * width);
    qkv_bias = take(3 * width);
    output_weight = take(width * width);
    output_bias = take(width);
    norm1_weight = take(width);
    norm1_bias = take(width);
    up_weight = take(intermediate * width);
    up_bias = take(intermediate);
    down_weight = take(width * intermediate);
    down_bias = take(width);
    norm2_weight = take(width);
    norm2_bias = take(width);
  }
};

template <class T>
cudaError_t conditional_encoder_layer(const ConditionalEncoderLayerParams<T>& p, cudaStream_t stream) {
  if (p.capacity == 0) return cudaSuccess;
  const int64_t area = p.capacity * p.width;
  T* const x1 = p.workspace;
  T* const branch = x1 + area;
  T* const qkv = branch + area;
  T* const context = qkv + 3 * area;
  T* const up = qkv;
  const EncoderLayerWeights<T> w(p.weights, p.width, p.intermediate);
  const int32_t head_dim = p.width / p.num_heads;
  const float scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(head_dim)));

  const auto product = [&](const T* a, const int32_t* rows, const T* weight, const T* bias, T* out, int32_t n,
                           int32_t k, Activation activation) {
    return launch_product<T>(
        {a, rows, weight, bias, out, n, k, activation, p.counts, p.capacity, p.multiprocessors, p.tile},
        stream);
  };
  const auto residual_norm = [&](const ResidualNormParams<T>& norm) {
    return launch_residual_norm<T>(norm, p.multiprocessors, stream);
  };

  cudaError_t error =
      product(p.hidden, p.rows, w.qkv_weight, w.qkv_bias, qkv, 3 * p.width, p.width, Activation::none);
  if (error == cudaSuccess)
    error = launch_attention<T>(
        {qkv, context, p.cu_seqlens, p.counts, p.capacity, p.samples, p.width, head_dim, scale}, stream);
  if (error == cudaSuccess)
    error = product(context, nullptr, w.output_weight, nullptr, branch, p.width, p.width, Activation::none);
  if (error == cudaSuccess)
    error = residual_norm({branch, w.output_bias, p.hidden, p.rows, w.norm1_weight, w.norm1_bias, x1, nullptr,
                           p.counts, p.capacity, p.width, p.eps});
  if (error == cudaSuccess)
    error = product(x1, nullptr, w.up_weight, w.up_bias, up, p.intermediate, p.width, p.activation);
  if (error == cudaSuccess)
    error = product(up, nullptr, w.down_weight, nullptr, branch, p.width, p.intermediate, Activation::none);
  if (error == cudaSuccess)
    error = residual_norm({branch, w.down_bias, x1, nullptr, w.norm2_weight, w.norm2_bias, p.hidden, p.rows,
                           p.counts, p.capacity, p.width, p.eps});
  return error;
}

}  // namespace dynplan::kernels::cuda
