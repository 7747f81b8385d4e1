// Contract of dynplan::conditional_encoder_layer, dynplan::conditional_encoder and
// dynplan::pack_encoder_weights.
//
//   pack_encoder_weights(weights: 12 tensors of one floating dtype, in the order
//       qkv (3H, H) (3H,), output (H, H) (H,), norm1 (H,) (H,), up (I, H) (I,), down (H, I) (H,), norm2 (H,)
//       (H,))
//     -> opaque, the layout of the device's kernels: on CPU uint8 (bytes,), kernels/encoder/packed_weights.h;
//        on CUDA the parameters end to end (N,) in their own dtype, which the rows must share
//   conditional_encoder_layer(hidden (T, H), rows int32 (T,), cu_seqlens int32 (B+1,), counts int32 (2,),
//       packed_weights, num_heads, activation, eps) -> (T, H)
//   conditional_encoder(hidden (T, H), rows int32 (L, T), cu_seqlens int32 (L, B+1), counts int32 (L, 2),
//       packed_weights[L], num_heads, activation, eps) -> (T, H)
//
// rows, cu_seqlens, counts: the dispatch of build_dispatch. activation: gelu, gelu_new, gelu_pytorch_tanh,
// relu, silu. Rows outside the dispatch come out bit for bit. No autograd:
// dynplan/ops/conditional_encoder_layer.py composes the differentiable path from PyTorch operations.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "kernels/encoder/activation.h"

namespace dynplan {

struct EncoderSizes {
  int64_t hidden, intermediate;
};

// Checks shapes, dtypes and devices: the kernels take float32 and bfloat16, on CUDA float16 too. `op` is the
// name errors carry.
EncoderSizes check_pack_encoder_weights(const char* op, at::TensorList weights);

// The arguments of one call of either op, checked, integers dense.
struct EncoderCall {
  const char* op;  // the name errors carry
  at::Tensor hidden;
  at::Tensor rows, cu_seqlens, counts;  // of one layer, or of all with the layers in front
  at::TensorList packed_weights;        // one a layer
  int64_t num_heads;
  kernels::Activation activation;
  float eps;

  int64_t layers() const { return static_cast<int64_t>(packed_weights.size()); }
  int64_t capacity() const { return hidden.size(0); }
  int64_t width() const { return hidden.size(1); }
  int64_t samples() const { return cu_seqlens.size(-1) - 1; }
};

// Checks the options that every encoder op has, and that packed_weights are of type `wanted` on the CPU or on
// `device`. Returns the activation.
kernels::Activation check_encoder_options(const char* op, int64_t width, at::TensorList packed_weights,
                                          at::ScalarType wanted, int64_t num_heads,
                                          std::string_view activation,
                                          at::Device device = at::Device(at::kCPU));

// Checks what both devices ask for; dtypes of `hidden` and contents are left to each.
EncoderCall check_conditional_encoder(const char* op, const at::Tensor& hidden, const at::Tensor& rows,
                                      const at::Tensor& cu_seqlens, const at::Tensor& counts,
                                      at::TensorList packed_weights, int64_t num_heads,
                                      std::string_view activation, double eps);

// Both ops of a device, from the one function that computes a checked call.
template <at::Tensor (*compute)(const EncoderCall&)>
at::Tensor conditional_encoder_layer(const at::Tensor& hidden, const at::Tensor& rows,
                                     const at::Tensor& cu_seqlens, const at::Tensor& counts,
                                     const at::Tensor& packed_weights, int64_t num_heads,
                                     c10::string_view activation, double eps) {
  return compute(check_conditional_encoder("conditional_encoder_layer", hidden, rows, cu_seqlens, counts,
                                           packed_weights, num_heads, activation, eps));
}

template <at::Tensor (*compute)(const EncoderCall&)>
at::Tensor conditional_encoder(const at::Tensor& hidden, const at::Tensor& rows, const at::Tensor& cu_seqlens,
                               const at::Tensor& counts, at::TensorList packed_weights, int64_t num_heads,
                               c10::string_view activation, double eps) {
  return compute(check_conditional_encoder("conditional_encoder", hidden, rows, cu_seqlens, counts,
                                           packed_weights, num_heads, activation, eps));
}

}  // namespace dynplan
