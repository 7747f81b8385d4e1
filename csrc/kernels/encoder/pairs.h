// Products with weights in bfloat16, two to a lane (packed_weights.h).
//
//   c[r, n] = start[r, n] + sum_k a[r, k] b[k, n]       b in bfloat16, sums in float32, k in ascending order
//
// Two ways. Where the CPU multiplies bfloat16 itself (AVX512-BF16) the rows of a are rounded to pairs as
// well, and one instruction adds the products of two k: twice the rate of float32. Elsewhere panels are
// widened to float32, a tile's at a time, into the cache where all tiles of rows then find them: the rate of
// float32, with half of the weights' memory to read, and a as it is.
//
// Tried and lost (AVX2, batch 32): widening in the tile's own loop, 30 % slower; a register short, it spills.
//
// Included once per instruction set, after product.h.
#pragma once

#include "kernels/encoder/product.h"
#include "kernels/encoder/scratch.h"

// Set by encoder/isa/avx512.cpp, which includes <immintrin.h> for it.
#ifdef DYNPLAN_PAIR_INSTRUCTIONS
#define DYNPLAN_PAIR_TARGET __attribute__((target("avx512bf16")))
#endif

namespace dynplan::kernels::DYNPLAN_ISA {

// `panels` panels of pairs as panels of float32.
inline void widen_panels(const float* pairs, int64_t panels, int64_t depth, float* out) {
  const int64_t steps = (depth + 1) / 2;
  for (int64_t panel = 0; panel < panels; ++panel, pairs += steps * kPanel, out += depth * kPanel)
    for (int64_t k = 0; k < depth; k += 2)
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        const BitVec bits = load_bits(pairs + k / 2 * kPanel + j);
        store(out + k * kPanel + j, as_floats(bits << 16));
        if (k + 1 < depth) store(out + (k + 1) * kPanel + j, as_floats(bits & 0xffff0000u));
      }
}

#ifdef DYNPLAN_PAIR_INSTRUCTIONS

inline bool multiplies_pairs() {
  return __builtin_cpu_supports("avx512bf16");
}

// a and b in pairs: TileArguments counts a in lanes, and its depth in steps.
struct PairTile {
  template <int kRows, int kPanels>
  DYNPLAN_PAIR_TARGET static void run(const TileArguments& t) {
    static_assert(kPanel == kLanes);
    __m512 sums[kRows][kPanels];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kPanels; ++v)
        sums[r][v] = t.start.data != nullptr
                         ? _mm512_loadu_ps(t.start.data + r * t.start.row_step + v * kLanes)
                         : _mm512_setzero_ps();
    const float *a = t.a, *b = t.b.data;
    const char* ahead = t.ahead.data;
    const int64_t a_step = t.a_step, b_step = t.b.step, b_stride = t.b.stride, ahead_step = t.ahead.step;
    for (int64_t k = t.depth; k > 0; --k, ++a, b += b_step, ahead += ahead_step) {
      __builtin_prefetch(ahead);
      __m512bh right[kPanels];
      for (int v = 0; v < kPanels; ++v) right[v] = (__m512bh)_mm512_loadu_ps(b + v * b_stride);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512bh left = (__m512bh)_mm512_set1_ps(a[r * a_step]);
        for (int v = 0; v < kPanels; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kPanels; ++v) _mm512_storeu_ps(t.c + r * t.c_step + v * kLanes, sums[r][v]);
  }
};

// One row into pairs, to nearest, a zero beyond an odd end. Reads whole vectors: rows are padded
// (buffer_step).
DYNPLAN_PAIR_TARGET inline void round_to_pairs(const float* x, int64_t depth, float* pairs) {
  for (int64_t k = 0; k < depth; k += 2 * kLanes)
    _mm512_storeu_ps(pairs + k / 2,
                     (__m512)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + kLanes), _mm512_loadu_ps(x + k)));
  if (depth % 2 != 0) {
    uint32_t last;
    std::memcpy(&last, pairs + depth / 2, 4);
    last &= 0xffff;
    std::memcpy(pairs + depth / 2, &last, 4);
  }
}

#else

inline bool multiplies_pairs() {
  return false;
}

#endif

// A thread's memory for rounded rows or for widened panels, of an inner dimension of at most `depth`.
inline int64_t pair_step(int64_t depth) {
  return round_up((depth + 1) / 2, kPanel) + kPanel;
}
inline float* thread_pairs(int64_t rows, int64_t depth) {
  thread_local ThreadScratch scratch;
  return scratch.at_least(multiplies_pairs() ? rows * pair_step(depth) : kTilePanels * kPanel * depth);
}

// The left side of a product, as the kernel for weights of `type` reads it.
struct Operand {
  const float* rows;
  int64_t step;  // lanes
  bool pairs;

  // Rounded rows are good until the thread makes its next operand.
  Operand(WeightType type, [[maybe_unused]] int64_t count, [[maybe_unused]] int64_t depth, const float* x,
          int64_t x_step)
      : rows(x), step(x_step), pairs(type == WeightType::bfloat16 && multiplies_pairs()) {
#ifdef DYNPLAN_PAIR_INSTRUCTIONS
    if (!pairs) return;
    step = pair_step(depth);
    float* rounded = thread_pairs(count, depth);
    for (int64_t r = 0; r < count; ++r) round_to_pairs(x + r * x_step, depth, rounded + r * step);
    rows = rounded;
#endif
  }
};

// `range` of the panels of c = start + a b, b packed as `type`.
template <class Finish>
void multiply_packed(WeightType type, int64_t rows, int64_t depth, const Operand& a, const float* panels,
                     Range range, const float* bias, float* c, int64_t c_step, Finish finish) {
  const int64_t stride = panel_steps(type, depth) * kPanel;
  const Panels b = {panels, kPanel, stride};
  if (type == WeightType::float32)
    return multiply(rows, depth, a.rows, a.step, b, range, {bias, 0}, c, c_step, finish);
#ifdef DYNPLAN_PAIR_INSTRUCTIONS
  if (a.pairs)
    return multiply<PairTile>(rows, panel_steps(type, depth), a.rows, a.step, b, range, {bias, 0}, c, c_step,
                              finish);
#endif
  float* wide = thread_pairs(rows, depth);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t panel = range.first; panel < range.last; panel += kTilePanels) {
    const int64_t count = range.last - panel < kTilePanels ? range.last - panel : kTilePanels,
                  begin = panel * kPanel;
    const int64_t next = panel + count < range.last ? panel + count : range.next;
    widen_panels(panels + panel * stride, count, depth, wide);
    // The next panels of pairs, in equal shares of bytes a step.
    const Ahead after = {reinterpret_cast<const char*>(panels + (next < 0 ? 0 : next) * stride),
                         next < 0 ? 0 : 2 * kPanel * count / tiles};
    multiply(
        rows, depth, a.rows, a.step, {wide, kPanel, depth * kPanel}, {0, count}, {bias + begin, 0}, c + begin,
        c_step,
        [&](int64_t row, int tile_rows, int64_t column, int64_t columns) {
          finish(row, tile_rows, begin + column, columns);
        },
        after);
  }
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
