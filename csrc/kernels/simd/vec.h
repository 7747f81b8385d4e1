// Vectors of T (float or double) as wide as the instruction set that includes this file, and their elementary
// functions. The including file defines DYNPLAN_ISA (a namespace) and DYNPLAN_VECTOR_BYTES; nothing here may
// be instantiated outside that namespace, or one instruction set's code would run on another's machine.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Everything here must end up inside its caller: a call would spill the vectors that are live around it.
#define DYNPLAN_INLINE [[gnu::always_inline]] inline

namespace dynplan::kernels::DYNPLAN_ISA {

// Whether the instruction set multiplies and adds with one rounding.
#if DYNPLAN_VECTOR_BYTES > 16 || defined(__aarch64__)
inline constexpr bool kFusedMultiplyAdd = true;
#else
inline constexpr bool kFusedMultiplyAdd = false;
#endif

#if DYNPLAN_VECTOR_BYTES == 32
typedef float Lanes256 __attribute__((vector_size(32)));
#endif

// Whether comparisons leave a bit per lane in a register of its own kind.
#if DYNPLAN_VECTOR_MASKS
inline constexpr bool kVectorMasks = true;
inline constexpr int kWideBytes = 64;  // of the widest vectors
#else
inline constexpr bool kVectorMasks = false;
inline constexpr int kWideBytes = DYNPLAN_VECTOR_BYTES;
#endif

template <class Element, int kBytes = DYNPLAN_VECTOR_BYTES>
struct Simd {
  using T = Element;
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T V __attribute__((vector_size(kBytes)));
  typedef Int M __attribute__((vector_size(kBytes)));
  typedef std::make_unsigned_t<Int> U __attribute__((vector_size(kBytes)));
  static constexpr int lanes = kBytes / sizeof(T);
  // Vectors anywhere in memory. Unlike with memcpy, the compiler knows that storing one changes no pointer
  // and no count.
  typedef T AnyV __attribute__((vector_size(kBytes), aligned(sizeof(T))));
  typedef Int AnyM __attribute__((vector_size(kBytes), aligned(sizeof(T))));

  DYNPLAN_INLINE static V load(const T* p) { return *reinterpret_cast<const AnyV*>(p); }
  DYNPLAN_INLINE static M load(const Int* p) { return *reinterpret_cast<const AnyM*>(p); }
  DYNPLAN_INLINE static void store(Int* p, M v) { *reinterpret_cast<AnyM*>(p) = v; }
  DYNPLAN_INLINE static void store(T* p, V v) { *reinterpret_cast<AnyV*>(p) = v; }
  // The first `count` elements; 0 after them.
  DYNPLAN_INLINE static V load_first(const T* p, int64_t count) {
    if (count >= lanes) return load(p);
    V v{};
    std::memcpy(&v, p, count * sizeof(T));
    return v;
  }
  // Vectors that begin one element before `p`, at it, and one after it.
  DYNPLAN_INLINE static void load_around(const T* p, V (&values)[3]) {
#if DYNPLAN_VECTOR_MASKS
    // Vectors of 64 bytes straddle two cache lines anywhere but at their beginning: it is cheaper to shift
    // what three of them hold.
    if constexpr (kBytes == 64 && lanes == 16) {
      const __m512i before = std::bit_cast<__m512i>(load(p - lanes)), here = std::bit_cast<__m512i>(load(p)),
                    after = std::bit_cast<__m512i>(load(p + lanes));
      values[0] = std::bit_cast<V>(_mm512_maskz_alignr_epi32(0xffff, here, before, lanes - 1));
      values[1] = std::bit_cast<V>(here);
      values[2] = std::bit_cast<V>(_mm512_maskz_alignr_epi32(0xffff, after, here, 1));
      return;
    }
#endif
    for (int x = 0; x < 3; ++x) values[x] = load(p + x - 1);
  }
  DYNPLAN_INLINE static V fill(T value) {
    return V{} + value;
  }
  DYNPLAN_INLINE static M fill_int(Int value) {
    return M{} + value;
  }
  DYNPLAN_INLINE static V masked(M mask, V v) {
    return std::bit_cast<V>(mask & std::bit_cast<M>(v));
  }
  DYNPLAN_INLINE static V unmasked(M mask, V v) {
    return std::bit_cast<V>(~mask & std::bit_cast<M>(v));
  }
  // One bit per lane of a comparison's result.
  DYNPLAN_INLINE static unsigned bits(M mask) {
#if DYNPLAN_VECTOR_MASKS
    if constexpr (kBytes == 64) return _mm512_movepi32_mask(std::bit_cast<__m512i>(mask));
#endif
#if DYNPLAN_VECTOR_BYTES == 32
    if constexpr (kBytes == 32) return __builtin_ia32_movmskps256(std::bit_cast<Lanes256>(mask));
#endif
    unsigned result = 0;
    for (int lane = 0; lane < lanes; ++lane) result |= (mask[lane] != 0) << lane;
    return result;
  }
  DYNPLAN_INLINE static bool all(M mask) {
    return bits(mask) == (1u << lanes) - 1;
  }
  // NaN in `a` passes through.
  DYNPLAN_INLINE static V at_least(V a, T b) {
    return fill(b) > a ? fill(b) : a;
  }
  DYNPLAN_INLINE static V max(V a, V b) {
    return a > b ? a : b;
  }
  // a * b, rounded. A bare product may be fused with an addition that follows, in one copy of a loop and not
  // in another, and the same sum would have other bits.
  DYNPLAN_INLINE static V product(V a, V b) {
    return a * b + V{};
  }

  template <class F>
  DYNPLAN_INLINE static V per_lane(V v, F f) {
    for (int lane = 0; lane < lanes; ++lane) v[lane] = f(v[lane]);
    return v;
  }

  // Lanes that are wanted, in the form that takes least to keep and to apply, and the vector at `p`, 0 where
  // it is not wanted.
#if DYNPLAN_VECTOR_MASKS
  using Mask = std::conditional_t<kBytes == 64, __mmask16, __mmask8>;
  DYNPLAN_INLINE static Mask equal(M a, M b) {
    if constexpr (kBytes == 64)
      return _mm512_cmpeq_epi32_mask(std::bit_cast<__m512i>(a), std::bit_cast<__m512i>(b));
    else
      return _mm256_cmpeq_epi32_mask(std::bit_cast<__m256i>(a), std::bit_cast<__m256i>(b));
  }
  DYNPLAN_INLINE static V masked(Mask wanted, V v) {
    if constexpr (kBytes == 64)
      return std::bit_cast<V>(_mm512_maskz_mov_ps(wanted, std::bit_cast<__m512>(v)));
    else
      return std::bit_cast<V>(_mm256_maskz_mov_ps(wanted, std::bit_cast<__m256>(v)));
  }
  DYNPLAN_INLINE static V load_masked(const T* p, Mask wanted) {
    if constexpr (kBytes == 64)
      return std::bit_cast<V>(_mm512_maskz_loadu_ps(wanted, p));
    else
      return std::bit_cast<V>(_mm256_maskz_loadu_ps(wanted, p));
  }
#else
  using Mask = M;
  DYNPLAN_INLINE static Mask equal(M a, M b) {
    return a == b;
  }
  DYNPLAN_INLINE static V load_masked(const T* p, Mask wanted) {
    return masked(wanted, load(p));
  }
#endif

  // e^x for x <= 88, within 1 ulp for float; 0 where it is below the smallest normal number. NaN passes
  // through. Range reduction by a multiple of ln 2, then a minimax polynomial, its terms paired: this is
  // called in sequence, and what limits it is how many calls are in flight.
  DYNPLAN_INLINE static V exp(V x) {
    if constexpr (sizeof(T) == 8) {
      return per_lane(x, [](double v) { return std::exp(v); });
    } else {
      constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
      const V shifted = x * 1.44269504f + kRound;
      const V n = shifted - kRound;
      // Without fused multiply-adds the multiple is taken off in two parts, the first without rounding.
      const V r = kFusedMultiplyAdd ? x - n * 0.693147182f : x - n * 0.693359375f + n * 2.12194440e-4f, r2 = r * r;
      const V low = r * 0.16666521f + 0.49999994f,
              high = r2 * 1.3814594e-3f + (r * 8.368719e-3f + 4.166839e-2f);
      const V y = (high * r2 + low) * r2 + (r + 1.f);
      // Unsigned, for lanes that are out of range overflow before they are put to 0.
      const U power = std::bit_cast<U>(shifted) << 23;
      return unmasked(x < -87.3f, std::bit_cast<V>(std::bit_cast<U>(y) + power));
    }
  }

  // ln x for normal x > 0, by Cephes' polynomial (logf.c) on [sqrt(1/2), sqrt(2)); about -87.3 for x = 0.
  DYNPLAN_INLINE static V log(V x) {
    if constexpr (sizeof(T) == 8) {
      return per_lane(x, [](double v) { return std::log(v); });
    } else {
      const V positive = at_least(x, 1.17549435e-38f);
      const M bits = std::bit_cast<M>(positive);
      const V mantissa = std::bit_cast<V>((bits & 0x7fffff) | 0x3f800000);
      const M high = mantissa > 1.41421356f;
      const V f = (high ? mantissa * 0.5f : mantissa) - 1.f;
      const V e = __builtin_convertvector((bits >> 23) - 127 - high, V);
      V y = f * 7.0376836292e-2f - 1.1514610310e-1f;
      y = y * f + 1.1676998740e-1f;
      y = y * f - 1.2420140846e-1f;
      y = y * f + 1.4249322787e-1f;
      y = y * f - 1.6668057665e-1f;
      y = y * f + 2.0000714765e-1f;
      y = y * f - 2.4999993993e-1f;
      y = y * f + 3.3333331174e-1f;
      y = y * (f * f * f) + (e * -2.12194440e-4f - 0.5f * (f * f));
      return (f + y) + e * 0.693359375f + (x - x);  // the last term keeps NaN
    }
  }

  // ln(1 + x) for x >= 0, accurate for small x: the part of x that 1 + x rounds away is added back.
  DYNPLAN_INLINE static V log1p(V x) {
    if constexpr (sizeof(T) == 8) {
      return per_lane(x, [](double v) { return std::log1p(v); });
    } else {
      const V y = x + 1.f;
      return log(y) + (x - (y - 1.f)) / y;
    }
  }

  // x^exponent for x >= 0; exactly repeated multiplication for small whole exponents, 0^exponent = 0 for
  // exponent > 0.
  DYNPLAN_INLINE static V pow(V x, T exponent) {
    const int whole = exponent <= 32 ? static_cast<int>(exponent) : -1;
    if (whole == exponent) {
      V y = fill(1), square = x;
      for (int left = whole; left > 0; left >>= 1, square *= square)
        if (left & 1) y *= square;
      return y;
    }
    return masked(x > 0, exp(exponent * log(x)));
  }
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
