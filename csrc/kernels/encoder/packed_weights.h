// The blob one encoder layer's weights are packed into, the same for every instruction set.
//
// A 64-byte header, then sections of 32-bit lanes, each starting on 64 bytes:
//   qkv panels, qkv bias, output panels, output bias, norm1 weight, norm1 bias,
//   up panels, up bias, down panels, down bias, norm2 weight, norm2 bias
// A weight (N, K) of nn.Linear becomes ceil(N / 16) panels of (steps, 16) lanes, with zeros beyond N and K:
//   float32    K steps, panel[k][j] = weight[16 p + j, k]
//   bfloat16   ceil(K / 2) steps, panel[k][j] = weight[16 p + j, 2 k] in the low half of the lane and
//              weight[16 p + j, 2 k + 1] in the high half
// A product then streams a panel from front to back, and one step reads whole vectors: one of 16 lanes, two
// of 8 or four of 4. Vectors are float32 either way, padded with zeros to a multiple of 16.
//
// int8 weights have the same header and a layout of their own, ReducedLayout.
#pragma once

#include <cstdint>
#include <cstring>

namespace dynplan::kernels {

constexpr int64_t kPanel = 16;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

enum class WeightType : int64_t { float32 = 0, bfloat16 = 1, int8 = 2 };

inline const char* name(WeightType type) {
  return type == WeightType::int8 ? "int8" : type == WeightType::bfloat16 ? "bfloat16" : "float32";
}

struct PackedHeader {
  uint32_t magic;
  uint32_t version;
  int64_t hidden_size;
  int64_t intermediate_size;
  WeightType type;
  int64_t reserved[4];
};
static_assert(sizeof(PackedHeader) == 64);

constexpr uint32_t kPackedMagic = 0x64706577;  // "dpew"
constexpr uint32_t kPackedVersion = 1;

constexpr PackedHeader packed_header(WeightType type, int64_t hidden_size, int64_t intermediate_size) {
  return {kPackedMagic, kPackedVersion, hidden_size, intermediate_size, type, {}};
}

// Lanes of a panel's column for an inner dimension of `depth`.
constexpr int64_t panel_steps(WeightType type, int64_t depth) {
  return type == WeightType::bfloat16 ? (depth + 1) / 2 : depth;
}

// Where each section of float32 or bfloat16 weights starts, in lanes from the end of the header.
struct PackedLayout {
  WeightType type;
  int64_t hidden, intermediate;
  int64_t qkv, qkv_bias, output, output_bias, norm1_weight, norm1_bias;
  int64_t up, up_bias, down, down_bias, norm2_weight, norm2_bias, floats;

  PackedLayout(WeightType type, int64_t hidden_size, int64_t intermediate_size)
      : type(type), hidden(hidden_size), intermediate(intermediate_size) {
    const int64_t h = round_up(hidden, kPanel), i = round_up(intermediate, kPanel),
                  q = round_up(3 * hidden, kPanel);
    const int64_t across = panel_steps(type, hidden), down_steps = panel_steps(type, intermediate);
    int64_t at = 0;
    const auto take = [&at](int64_t count) { return (at += count) - count; };
    qkv = take(q * across), qkv_bias = take(q);
    output = take(h * across), output_bias = take(h);
    norm1_weight = take(h), norm1_bias = take(h);
    up = take(i * across), up_bias = take(i);
    down = take(h * down_steps), down_bias = take(h);
    norm2_weight = take(h), norm2_bias = take(h);
    floats = at;
  }
  int64_t bytes() const { return static_cast<int64_t>(sizeof(PackedHeader)) + 4 * floats; }
};

// Weights in int8, (columns, depth) as nn.Linear has them: where elements, scales and bias start, in bytes.
struct ReducedMatrix {
  int64_t columns, depth;
  int64_t elements, scales, bias;
};

// Where each section of int8 weights starts, in bytes from the front of the blob; each on 64 bytes. Vectors
// are float32, padded with zeros to a multiple of kPanel.
struct ReducedLayout {
  ReducedMatrix qkv, output, up, down;
  int64_t norm1_weight, norm1_bias, norm2_weight, norm2_bias;
  int64_t bytes = sizeof(PackedHeader);

  ReducedLayout(int64_t h, int64_t i) {
    const auto take = [this](int64_t size) { return (bytes += round_up(size, 64)) - round_up(size, 64); };
    const auto vector = [&](int64_t n) { return take(4 * round_up(n, kPanel)); };
    const auto matrix = [&](int64_t columns, int64_t depth) {
      const int64_t elements = take(columns * depth), scales = vector(columns);
      return ReducedMatrix{columns, depth, elements, scales, vector(columns)};
    };
    qkv = matrix(3 * h, h), output = matrix(h, h), up = matrix(i, h), down = matrix(h, i);
    norm1_weight = vector(h), norm1_bias = vector(h);
    norm2_weight = vector(h), norm2_bias = vector(h);
  }
};

inline float to_float(float value) {
  return value;
}

struct BFloat16 {
  uint16_t bits;
};
inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline BFloat16 to_bfloat16(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// One layer's weights as nn.Linear and nn.LayerNorm keep them, all dense, all of one type.
template <class T>
struct EncoderLayerTensors {
  const T *qkv_weight, *qkv_bias, *output_weight, *output_bias, *norm1_weight, *norm1_bias;
  const T *up_weight, *up_bias, *down_weight, *down_bias, *norm2_weight, *norm2_bias;
};

// panels: round_up(n, kPanel) * panel_steps(type, k) lanes.
template <class T>
void pack_matrix(WeightType type, const T* weight, int64_t n, int64_t k, float* panels) {
  const int64_t steps = panel_steps(type, k);
  const auto value = [&](int64_t column, int64_t row) {
    return column < n && row < k ? to_float(weight[column * k + row]) : 0.f;
  };
  for (int64_t first = 0; first < n; first += kPanel, panels += steps * kPanel)
    for (int64_t column = first; column < first + kPanel; ++column)
      for (int64_t step = 0; step < steps; ++step) {
        float* lane = panels + step * kPanel + column - first;
        if (type == WeightType::float32) {
          *lane = value(column, step);
        } else {
          const BFloat16 pair[2] = {to_bfloat16(value(column, 2 * step)),
                                    to_bfloat16(value(column, 2 * step + 1))};
          const uint32_t bits = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
          std::memcpy(lane, &bits, 4);
        }
      }
}

template <class T>
void pack_vector(const T* values, int64_t n, float* out) {
  for (int64_t i = 0; i < round_up(n, kPanel); ++i) out[i] = i < n ? to_float(values[i]) : 0.f;
}

// blob holds PackedLayout(type, h, i).bytes(), aligned to 64 bytes.
template <class T>
void pack_encoder_weights(WeightType type, const EncoderLayerTensors<T>& w, int64_t h, int64_t i,
                          void* blob) {
  const PackedHeader header = packed_header(type, h, i);
  std::memcpy(blob, &header, sizeof(header));
  const PackedLayout at(type, h, i);
  float* out = reinterpret_cast<float*>(static_cast<char*>(blob) + sizeof(header));
  pack_matrix(type, w.qkv_weight, 3 * h, h, out + at.qkv);
  pack_vector(w.qkv_bias, 3 * h, out + at.qkv_bias);
  pack_matrix(type, w.output_weight, h, h, out + at.output);
  pack_vector(w.output_bias, h, out + at.output_bias);
  pack_vector(w.norm1_weight, h, out + at.norm1_weight);
  pack_vector(w.norm1_bias, h, out + at.norm1_bias);
  pack_matrix(type, w.up_weight, i, h, out + at.up);
  pack_vector(w.up_bias, i, out + at.up_bias);
  pack_matrix(type, w.down_weight, h, i, out + at.down);
  pack_vector(w.down_bias, h, out + at.down_bias);
  pack_vector(w.norm2_weight, h, out + at.norm2_weight);
  pack_vector(w.norm2_bias, h, out + at.norm2_bias);
}

}  // namespace dynplan::kernels
