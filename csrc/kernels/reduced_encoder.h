// Encoder layers whose matrix products run in int8 or bfloat16. Between products everything is float32:
// attention, norms, activations and the residual stream (conditional_encoder_layer.h).
//
//   int8       y[r, n] = s[r] t[n] sum_k a[r, k] w[n, k] + bias[n]
//              s[r] = max |x[r]| / 127        a[r] = round(x[r] / s[r])    made anew for every product
//              t[n] = max |W[n]| / levels     w[n] = round(W[n] / t[n])    made once
//   bfloat16   y[r, n] = bfloat16(sum_k bfloat16(x[r, k]) bfloat16(W[n, k])) + bias[n]
//
// Both steps are symmetric: no zero points. Sums of int8 are exact, so their bits depend on nothing. Those of
// bfloat16 are the library's own; which rows share a product depends on the number of active rows alone.
//
// The product itself is a library's and is handed in as a ReducedProduct. The rows that leave a product are
// decoded, finished (bias, activation, residual, norm) and encoded for the next one while a row is in the
// first-level cache (encoder/reduced_layer.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>

#include "kernels/conditional_encoder_layer.h"

namespace dynplan::kernels {

enum class ReducedDtype : int64_t { int8 = 1, bfloat16 = 2 };

// out (rows, columns) = a (rows, depth) weight (columns, depth)^T, all dense: int8 into int32, or bfloat16
// into bfloat16. Called from several threads at once, and outside parallel ranges, where it may use threads
// itself.
using ReducedProduct = FunctionRef<void(int64_t rows, int64_t columns, int64_t depth, const void* a,
                                        const void* weight, void* out)>;

constexpr int64_t kRowLevels = 127;

// Below this a row or a channel counts as zero: 127 over it would not be finite.
constexpr float kReducedSmallest = 1e-36f;

struct ReducedHeader {
  uint32_t magic;
  uint32_t version;
  int64_t hidden_size;
  int64_t intermediate_size;
  ReducedDtype dtype;
  int64_t reserved[4];
};
static_assert(sizeof(ReducedHeader) == 64);

constexpr uint32_t kReducedMagic = 0x64707266;  // "dprf"
constexpr uint32_t kReducedVersion = 1;

// A weight (columns, depth) as nn.Linear has it: where its elements, scales and bias start, in bytes.
struct ReducedMatrix {
  int64_t columns, depth;
  int64_t elements, scales, bias;
};

// Where each section of a blob starts, in bytes from its front; each on 64 bytes. Vectors are float32, padded
// with zeros to a multiple of kPanel.
struct ReducedLayout {
  ReducedMatrix qkv, output, up, down;
  int64_t norm1_weight, norm1_bias, norm2_weight, norm2_bias;
  int64_t bytes = sizeof(ReducedHeader);

  ReducedLayout(ReducedDtype dtype, int64_t h, int64_t i) {
    const auto take = [this](int64_t size) { return (bytes += round_up(size, 64)) - round_up(size, 64); };
    const auto vector = [&](int64_t n) { return take(4 * round_up(n, kPanel)); };
    const int64_t size = dtype == ReducedDtype::int8 ? 1 : 2;
    const auto matrix = [&](int64_t columns, int64_t depth) {
      const int64_t elements = take(size * columns * depth), scales = vector(columns);
      return ReducedMatrix{columns, depth, elements, scales, vector(columns)};
    };
    qkv = matrix(3 * h, h), output = matrix(h, h), up = matrix(i, h), down = matrix(h, i);
    norm1_weight = vector(h), norm1_bias = vector(h);
    norm2_weight = vector(h), norm2_bias = vector(h);
  }
};

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
float reduce_channel(const T* weight, int64_t n, int64_t /*levels*/, BFloat16* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = to_bfloat16(to_float(weight[k]));
  return 1.f;
}

template <class Element, class T>
void pack_reduced_matrix(const T* weight, const T* bias, const ReducedMatrix& at, int64_t levels,
                         char* blob) {
  float* scales = reinterpret_cast<float*>(blob + at.scales);
  Element* out = reinterpret_cast<Element*>(blob + at.elements);
  for (int64_t n = 0; n < at.columns; ++n)
    scales[n] = reduce_channel(weight + n * at.depth, at.depth, levels, out + n * at.depth);
  pack_vector(bias, at.columns, reinterpret_cast<float*>(blob + at.bias));
}

// blob holds ReducedLayout(dtype, h, i).bytes, aligned to 64 bytes. levels: the largest magnitude of an int8
// weight, at most 127; less where the product could not add larger ones exactly.
template <class Element, class T>
void pack_reduced_weights(const EncoderLayerTensors<T>& w, int64_t h, int64_t i, int64_t levels, void* blob) {
  const ReducedDtype dtype = sizeof(Element) == 1 ? ReducedDtype::int8 : ReducedDtype::bfloat16;
  const ReducedHeader header = {kReducedMagic, kReducedVersion, h, i, dtype, {}};
  const ReducedLayout at(dtype, h, i);
  std::memset(blob, 0, at.bytes);
  std::memcpy(blob, &header, sizeof(header));
  char* out = static_cast<char*>(blob);
  pack_reduced_matrix<Element>(w.qkv_weight, w.qkv_bias, at.qkv, levels, out);
  pack_reduced_matrix<Element>(w.output_weight, w.output_bias, at.output, levels, out);
  pack_reduced_matrix<Element>(w.up_weight, w.up_bias, at.up, levels, out);
  pack_reduced_matrix<Element>(w.down_weight, w.down_bias, at.down, levels, out);
  const auto vector = [&](const T* values, int64_t place) {
    pack_vector(values, h, reinterpret_cast<float*>(out + place));
  };
  vector(w.norm1_weight, at.norm1_weight), vector(w.norm1_bias, at.norm1_bias);
  vector(w.norm2_weight, at.norm2_weight), vector(w.norm2_bias, at.norm2_bias);
}

// What a blob says it holds; nothing if it is not one of these.
inline std::optional<ReducedDtype> reduced_dtype(const void* blob, int64_t bytes) {
  ReducedHeader header = {};
  if (bytes >= static_cast<int64_t>(sizeof(header))) std::memcpy(&header, blob, sizeof(header));
  if (header.magic != kReducedMagic) return std::nullopt;
  return header.dtype;
}

// The feed-forward width of a blob of `dtype` for layers of width `hidden_size`, or -1 with `problem` set.
inline int64_t check_reduced(const void* blob, int64_t bytes, ReducedDtype dtype, int64_t hidden_size,
                             std::string& problem) {
  ReducedHeader header = {};
  if (reduced_dtype(blob, bytes)) std::memcpy(&header, blob, sizeof(header));
  const bool known = dtype == ReducedDtype::int8 || dtype == ReducedDtype::bfloat16;
  if (!known || header.version != kReducedVersion || header.dtype != dtype ||
      header.hidden_size != hidden_size || header.intermediate_size <= 0 ||
      header.intermediate_size > bytes ||
      ReducedLayout(dtype, hidden_size, header.intermediate_size).bytes != bytes) {
    problem =
        "packed_weights to come from pack_reduced_encoder_weights of this version, one dtype and width " +
        std::to_string(hidden_size) + ", got other bytes";
    return -1;
  }
  return header.intermediate_size;
}

// Floats of workspace for at most `active` rows in any layer.
constexpr int64_t reduced_workspace_floats(int64_t active, int64_t hidden_size, int64_t intermediate_size) {
  const int64_t few = active < kFewRows ? active : kFewRows;
  const int64_t widest = 3 * hidden_size > intermediate_size ? 3 * hidden_size : intermediate_size;
  return active * buffer_step(3 * hidden_size) + few * (2 * buffer_step(hidden_size) + 2 * widest + 1) +
         4 * kPanel;
}

// As conditional_encoder, on blobs of pack_reduced_weights; `p.workspace` holds reduced_workspace_floats().
DYNPLAN_PER_ISA(void reduced_encoder(const ConditionalEncoderParams& p, ReducedProduct product,
                                     Parallel parallel))

inline void reduced_encoder(const ConditionalEncoderParams& p, ReducedProduct product, Parallel parallel,
                            CpuIsa isa = cpu_isa()) {
  DYNPLAN_ON_ISA(isa, reduced_encoder(p, product, parallel));
}

}  // namespace dynplan::kernels
