// Encoder layers whose matrix products run in int8. Between products everything is float32: attention, norms,
// activations and the residual stream (conditional_encoder_layer.h).
//
//   y[r, n] = s[r] t[n] sum_k a[r, k] w[n, k] + bias[n]
//   s[r] = max |x[r]| / 127        a[r] = round(x[r] / s[r])    made anew for every product
//   t[n] = max |W[n]| / levels     w[n] = round(W[n] / t[n])    made once
//
// Both steps are symmetric: no zero points. Sums of integers are exact, so their bits depend on nothing.
//
// The product itself is a library's and is handed in as a ReducedProduct. The rows that leave a product are
// decoded, finished (bias, activation, residual, norm) and encoded for the next one while a row is in the
// first-level cache (encoder/reduced_layer.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/encoder/conditional_encoder_layer.h"

namespace dynplan::kernels {

// out (rows, columns) = a (rows, depth) weight (columns, depth)^T, all dense. Called from several threads at
// once, and outside parallel ranges, where it may use threads itself.
using ReducedProduct = FunctionRef<void(int64_t rows, int64_t columns, int64_t depth, const int8_t* a,
                                        const int8_t* weight, int32_t* out)>;

// Plain loops, where there is no library at hand.
inline constexpr auto plain_product = [](int64_t rows, int64_t columns, int64_t depth, const int8_t* a,
                                         const int8_t* weight, int32_t* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < columns; ++n) {
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += int32_t{a[r * depth + k]} * weight[n * depth + k];
      out[r * columns + n] = sum;
    }
};

constexpr int64_t kRowLevels = 127;

// At most this many active rows share each product between threads (encoder/reduced_layer.h).
constexpr int64_t kFewReducedRows = 64;

// Below this a row or a channel counts as zero: 127 over it would not be finite.
constexpr float kReducedSmallest = 1e-36f;

// One channel; returns its scale. Where a weight is not finite the whole channel comes out as NaN.
template <class T>
float reduce_channel(const T* weight, int64_t n, int64_t levels, int8_t* out) {
  float most = 0;
  bool finite = true;
  for (int64_t k = 0; k < n; ++k) {
    const float magnitude = std::fabs(to_float(weight[k]));
    finite &= std::isfinite(magnitude);
    most = magnitude > most ? magnitude : most;
  }
  const bool nothing = !finite || most < kReducedSmallest;
  const float step = nothing ? 0.f : static_cast<float>(levels) / most;
  for (int64_t k = 0; k < n; ++k)
    out[k] = nothing ? int8_t{0} : static_cast<int8_t>(std::nearbyint(to_float(weight[k]) * step));
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  return nothing ? 0.f : most / static_cast<float>(levels);
}

template <class T>
void pack_reduced_matrix(const T* weight, const T* bias, const ReducedMatrix& at, int64_t levels,
                         char* blob) {
  float* scales = reinterpret_cast<float*>(blob + at.scales);
  int8_t* out = reinterpret_cast<int8_t*>(blob + at.elements);
  for (int64_t n = 0; n < at.columns; ++n)
    scales[n] = reduce_channel(weight + n * at.depth, at.depth, levels, out + n * at.depth);
  pack_vector(bias, at.columns, reinterpret_cast<float*>(blob + at.bias));
}

// blob holds ReducedLayout(h, i).bytes, aligned to 64 bytes. levels: the largest magnitude of a weight, at
// most 127; less where the product could not add larger ones exactly.
template <class T>
void pack_reduced_weights(const EncoderLayerTensors<T>& w, int64_t h, int64_t i, int64_t levels, void* blob) {
  const PackedHeader header = packed_header(WeightType::int8, h, i);
  const ReducedLayout at(h, i);
  std::memset(blob, 0, at.bytes);
  std::memcpy(blob, &header, sizeof(header));
  char* out = static_cast<char*>(blob);
  pack_reduced_matrix(w.qkv_weight, w.qkv_bias, at.qkv, levels, out);
  pack_reduced_matrix(w.output_weight, w.output_bias, at.output, levels, out);
  pack_reduced_matrix(w.up_weight, w.up_bias, at.up, levels, out);
  pack_reduced_matrix(w.down_weight, w.down_bias, at.down, levels, out);
  const auto vector = [&](const T* values, int64_t place) {
    pack_vector(values, h, reinterpret_cast<float*>(out + place));
  };
  vector(w.norm1_weight, at.norm1_weight), vector(w.norm1_bias, at.norm1_bias);
  vector(w.norm2_weight, at.norm2_weight), vector(w.norm2_bias, at.norm2_bias);
}

// Floats of workspace for at most `active` rows in any layer.
constexpr int64_t reduced_workspace_floats(int64_t active, int64_t hidden_size, int64_t intermediate_size) {
  const int64_t few = active < kFewReducedRows ? active : kFewReducedRows;
  const int64_t widest = 3 * hidden_size > intermediate_size ? 3 * hidden_size : intermediate_size;
  return active * buffer_step(3 * hidden_size) + few * (2 * buffer_step(hidden_size) + 2 * widest + 1) +
         4 * kPanel;
}

// As conditional_encoder, on blobs of pack_reduced_weights; `p.workspace` holds reduced_workspace_floats().
DYNPLAN_PER_ISA(void reduced_encoder(const ConditionalEncoderParams& p, ReducedProduct product,
                                     Parallel parallel))

inline void reduced_encoder(const ConditionalEncoderParams& p, ReducedProduct product, Parallel parallel,
                            CpuIsa isa = cpu_isa()) {
  if (p.fill != nullptr) parallel(p.capacity, kFillGrain, *p.fill);
  DYNPLAN_ON_ISA(isa, reduced_encoder(p, product, parallel));
}

}  // namespace dynplan::kernels
