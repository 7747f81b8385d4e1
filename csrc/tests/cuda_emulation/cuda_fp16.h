// The part of CUDA's <cuda_fp16.h> that dynplan's kernels use, for cuda_runtime.h beside it.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31u,
                 fraction = value.bits & 0x3FFu;
  if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | fraction << 13);
  // 2^-24 is the step of the subnormals; both branches are exact.
  const float magnitude =
      exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                    : std::ldexp(static_cast<float>(fraction | 0x400u), static_cast<int>(exponent) - 25);
  return sign ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000u);
  if (value != value) return {0x7FFF};
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00u)};
  // The step of the result's binade; nearbyint rounds halves to even, and a carry into the next
  // binade or out of the subnormals is what the packed encoding does by itself.
  const int exponent = magnitude < 6.103515625e-05f ? -14 : std::ilogb(magnitude);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps))};
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 pair) {
  return {__half2float(pair.x), __half2float(pair.y)};
}
