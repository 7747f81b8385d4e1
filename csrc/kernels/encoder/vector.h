// Vectors of one instruction set and the functions the encoder needs of them. Included once per set, inside
// namespace DYNPLAN_ISA, with DYNPLAN_VECTOR_BYTES of its registers.
#pragma once

#include <cstdint>
#include <utility>

namespace dynplan::kernels::DYNPLAN_ISA {

constexpr int kLanes = DYNPLAN_VECTOR_BYTES / 4;

// Compilers' own vectors rather than intrinsics: the same source on every set. Aligned as a float, since rows
// of hidden states start anywhere.
typedef float Vec __attribute__((vector_size(DYNPLAN_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(DYNPLAN_VECTOR_BYTES), aligned(4), may_alias));

typedef uint32_t BitVec __attribute__((vector_size(DYNPLAN_VECTOR_BYTES), aligned(4), may_alias));

inline BitVec load_bits(const float* p) {
  return *reinterpret_cast<const BitVec*>(p);
}
inline Vec as_floats(BitVec bits) {
  return reinterpret_cast<const Vec&>(bits);
}
inline Vec load(const float* p) {
  return *reinterpret_cast<const Vec*>(p);
}
inline void store(float* p, Vec v) {
  *reinterpret_cast<Vec*>(p) = v;
}
inline Vec splat(float x) {
  return Vec{} + x;
}
inline Vec maximum(Vec a, Vec b) {
  return a > b ? a : b;
}

// The lanes I... of a and b end to end.
template <int... I>
inline Vec pick(Vec a, Vec b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, IntVec{I...});
#endif
}

// Lane i of v meets lane i + kDistance, round the end.
template <int kDistance, int... I>
inline Vec rotate(Vec v, std::integer_sequence<int, I...>) {
  return pick(v, v, std::integer_sequence<int, (I + kDistance) % kLanes...>());
}

// All lanes joined by `join`, in halves: no lane is taken out before the last step.
template <int kDistance = kLanes / 2, class Join>
inline float fold(Vec v, Join join) {
  v = join(v, rotate<kDistance>(v, std::make_integer_sequence<int, kLanes>()));
  if constexpr (kDistance > 1)
    return fold<kDistance / 2>(v, join);
  else
    return v[0];
}

inline float sum(Vec v) {
  return fold(v, [](Vec a, Vec b) { return a + b; });
}
inline float maximum(Vec v) {
  return fold(v, [](Vec a, Vec b) { return maximum(a, b); });
}

// Lanes of a and b in turn, from lane kFrom on: with kFrom 0 and kLanes / 2, all of them.
template <int kFrom, int... I>
inline Vec zip(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return pick(a, b, std::integer_sequence<int, kFrom + I / 2 + I % 2 * kLanes...>());
}

// v[i][j] and v[j][i] change places: every step is one shuffle of a pack of cards.
inline void transpose(Vec (&v)[kLanes]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Vec shuffled[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      shuffled[2 * i] = zip<0>(v[i], v[i + kLanes / 2], kAll);
      shuffled[2 * i + 1] = zip<kLanes / 2>(v[i], v[i + kLanes / 2], kAll);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = shuffled[i];
  }
}

// e^x to about one unit in the last place; x below -87.3 gives the smallest normal number, above 88.3 gives
// e^88.3.
inline Vec exp(Vec x) {
  x = x < -87.33f ? splat(-87.33f) : x;
  x = x > 88.3f ? splat(88.3f) : x;
  // 1.5 * 2^23 pushes the fraction out: the sum's low bits are round(x / ln 2).
  const Vec shifted = x * 1.44269504f + 12582912.f;
  const Vec n = shifted - 12582912.f;
  const Vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
  // e^r = 1 + r + r^2 p(r), minimax on |r| <= ln(2) / 2 (relative error 3e-9)
  Vec p = r * 0.00139505998f + 0.00836895406f;
  p = p * r + 0.041666206f;
  p = p * r + 0.166665182f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.f;
  const IntVec power = (reinterpret_cast<IntVec>(shifted) << 23) + (127 << 23);
  return p * reinterpret_cast<Vec>(power);
}

// x Phi(x) = relu(x) - |x| Phi(-|x|), with Phi(-u) = e^(-u^2/2) q(1 / (1 + 0.3 u)) and q a minimax polynomial
// (relative error 5e-8 for u <= 10). Exact-erf GELU; the negative tail keeps its relative accuracy.
inline Vec gelu(Vec x) {
  const Vec magnitude = x < 0.f ? -x : x;
  const Vec u = magnitude > 20.f ? splat(20.f) : magnitude;  // where Phi(-u) is nothing, and u^2 no infinity
  const Vec t = 1.f / (u * 0.3f + 1.f);
  Vec q = t * 0.0371244177f - 0.162960678f;
  q = q * t + 0.215570644f;
  q = q * t - 0.0611669384f;
  q = q * t + 0.131633893f;
  q = q * t + 0.0994855538f;
  q = q * t + 0.12064223f;
  q = q * t + 0.119675368f;
  q = q * t - 4.46271071e-6f;
  // 0.5 x + 0.5 |x| rather than a comparison: NaN stays NaN.
  return 0.5f * x + (0.5f * magnitude - u * q * exp(u * u * -0.5f));
}

inline Vec sigmoid_times(Vec x, Vec y) {
  return x / (exp(-y) + 1.f);
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x sigmoid(2 ...)
inline Vec gelu_tanh(Vec x) {
  return sigmoid_times(x, x * (x * x * 0.0713548163f + 1.59576912f));
}

inline Vec silu(Vec x) {
  return sigmoid_times(x, x);
}

inline Vec relu(Vec x) {
  return x < 0.f ? Vec{} : x;
}  // NaN stays NaN

}  // namespace dynplan::kernels::DYNPLAN_ISA
