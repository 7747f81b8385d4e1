// A conditional encoder layer on CUDA, in place: what conditional_encoder_layer.h computes, for T one of
// float,
// __nv_bfloat16 and __half. Instantiated in ops/cuda/conditional_encoder_layer_<type>.cu, so that who calls
// it compiles no kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dynplan::kernels::cuda {

constexpr int64_t kMaxWidth = 4096;
constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kSizeStep =
    8;  // divides width, intermediate and head_dim: rows are read 16 bytes at a time

// Rows x columns of the tiles that products are made of, by their number; those above 3 are for 16-bit
// numbers.
constexpr const char* kProductTiles[] = {"32x64", "64x64", "64x128", "128x128", "128x192", "128x256"};
constexpr int32_t kChosenTile = -1;  // the one that the counts say is fastest

enum class Activation : int32_t { none, gelu, gelu_tanh, relu, silu };

template <class T>
struct ConditionalEncoderLayerParams {
  T* hidden;                  // (capacity, width), rows of the dispatch are replaced, others not touched
  const int32_t* rows;        // (capacity,), -1 beyond counts[1]
  const int32_t* cu_seqlens;  // (samples + 1,)
  const int32_t* counts;      // (2,): active samples, active rows; read on the device alone
  int64_t capacity;
  int64_t samples;
  const T* weights;  // the twelve parameters end to end, in the order of EncoderLayerWeights
  int32_t width;
  int32_t intermediate;
  int32_t num_heads;
  Activation activation;
  float eps;
  T* workspace;  // encoder_workspace_size() numbers; may serve layer after layer
  int multiprocessors;
  int32_t tile = kChosenTile;  // of all products
};

inline int64_t encoder_workspace_size(int64_t capacity, int64_t width, int64_t intermediate) {
  const int64_t qkv_and_context = 4 * width;
  return capacity * (2 * width + (qkv_and_context > intermediate ? qkv_and_context : intermediate));
}

// Launches on `stream` and returns; no host read, no allocation.
template <class T>
cudaError_t conditional_encoder_layer(const ConditionalEncoderLayerParams<T>& p, cudaStream_t stream);

}  // namespace dynplan::kernels::cuda
