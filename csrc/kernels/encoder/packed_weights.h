// The blob one encoder layer's weights are packed into, the same for every instruction set.
//
// A 64-byte header, then float32 sections, each starting on 64 bytes:
//   qkv panels, qkv bias, output panels, output bias, norm1 weight, norm1 bias,
//   up panels, up bias, down panels, down bias, norm2 weight, norm2 bias
// A weight (N, K) of nn.Linear becomes ceil(N / 16) panels of (K, 16): panel[k][j] = weight[16 p + j, k],
// with zeros beyond N. A product then streams a panel from front to back, and one step of k reads whole
// vectors: one of 16 lanes, two of 8 or four of 4. Vectors are padded with zeros to a multiple of 16.
#pragma once

#include <cstdint>
#include <cstring>

namespace dynplan::kernels {

constexpr int64_t kPanel = 16;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct PackedHeader {
  uint32_t magic;
  uint32_t version;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t reserved[5];
};
static_assert(sizeof(PackedHeader) == 64);

constexpr uint32_t kPackedMagic = 0x64706577;  // "dpew"
constexpr uint32_t kPackedVersion = 1;

// Where each section starts, in floats from the end of the header.
struct PackedLayout {
  int64_t hidden, intermediate;
  int64_t qkv, qkv_bias, output, output_bias, norm1_weight, norm1_bias;
  int64_t up, up_bias, down, down_bias, norm2_weight, norm2_bias, floats;

  PackedLayout(int64_t hidden_size, int64_t intermediate_size)
      : hidden(hidden_size), intermediate(intermediate_size) {
    const int64_t h = round_up(hidden, kPanel), i = round_up(intermediate, kPanel),
                  q = round_up(3 * hidden, kPanel);
    int64_t at = 0;
    const auto take = [&at](int64_t count) { return (at += count) - count; };
    qkv = take(q * hidden), qkv_bias = take(q);
    output = take(h * hidden), output_bias = take(h);
    norm1_weight = take(h), norm1_bias = take(h);
    up = take(i * hidden), up_bias = take(i);
    down = take(h * intermediate), down_bias = take(h);
    norm2_weight = take(h), norm2_bias = take(h);
    floats = at;
  }
  int64_t bytes() const { return static_cast<int64_t>(sizeof(PackedHeader)) + 4 * floats; }
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

template <class T>
void pack_matrix(const T* weight, int64_t n, int64_t k, float* panels) {
  for (int64_t column = 0; column < n; column += kPanel, panels += k * kPanel)
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t i = 0; i < k; ++i)
        panels[i * kPanel + j] = column + j < n ? to_float(weight[(column + j) * k + i]) : 0.f;
}

template <class T>
void pack_vector(const T* values, int64_t n, float* out) {
  for (int64_t i = 0; i < round_up(n, kPanel); ++i) out[i] = i < n ? to_float(values[i]) : 0.f;
}

// blob holds PackedLayout(h, i).bytes(), aligned to 64 bytes.
template <class T>
void pack_encoder_weights(const EncoderLayerTensors<T>& w, int64_t h, int64_t i, void* blob) {
  const PackedHeader header = {kPackedMagic, kPackedVersion, h, i, {}};
  std::memcpy(blob, &header, sizeof(header));
  const PackedLayout at(h, i);
  float* out = reinterpret_cast<float*>(static_cast<char*>(blob) + sizeof(header));
  pack_matrix(w.qkv_weight, 3 * h, h, out + at.qkv);
  pack_vector(w.qkv_bias, 3 * h, out + at.qkv_bias);
  pack_matrix(w.output_weight, h, h, out + at.output);
  pack_vector(w.output_bias, h, out + at.output_bias);
  pack_vector(w.norm1_weight, h, out + at.norm1_weight);
  pack_vector(w.norm1_bias, h, out + at.norm1_bias);
  pack_matrix(w.up_weight, i, h, out + at.up);
  pack_vector(w.up_bias, i, out + at.up_bias);
  pack_matrix(w.down_weight, h, i, out + at.down);
  pack_vector(w.down_bias, h, out + at.down_bias);
  pack_vector(w.norm2_weight, h, out + at.norm2_weight);
  pack_vector(w.norm2_bias, h, out + at.norm2_bias);
}

}  // namespace dynplan::kernels
