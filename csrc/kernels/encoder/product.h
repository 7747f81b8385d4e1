// Matrix products with a right-hand side in panels of 16 columns.
//
//   c[r, n] = start[r, n] + sum_k a[r, k] b[k, n]
//
// The inner product keeps a tile of c in registers for the whole of k: kTileRows rows of a are read one
// element at a time and broadcast, so a needs no packing, and its rows stay in the first-level cache while
// panels stream past. The sum over k is one chain per element, in order: the bits do not depend on the tile
// an element falls into.
//
// Tried and lost (AVX-512, Zen 4, encoder of width 384 and of 768): blocks of 128 to 512 in k with the tile
// carried through memory, 4 to 12 % slower; tiles of 6, 8, 10 and 14 rows, 1 to 7 % slower.
#pragma once

#include <utility>

#include "kernels/encoder/packed_weights.h"
#include "kernels/encoder/vector.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Registers: rows * vectors of a tile, plus its vectors of b, plus one broadcast, out of 32 (AVX-512) or 16.
constexpr int kTilePanels = kLanes == 16 ? 2 : 1;
constexpr int kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 2;

struct Panels {
  const float* data;
  int64_t step;    // floats from one k to the next
  int64_t stride;  // floats from one panel to the next
};

// Panels [first, last), and where their thread will probably go on: -1 for nowhere.
struct Range {
  int64_t first, last;
  int64_t next = -1;
};

// Of a weight with so many columns.
constexpr Range all_panels(int64_t columns) {
  return {0, round_up(columns, kPanel) / kPanel};
}

// What a tile starts from: a row to be repeated (row_step 0), a matrix, or nothing (null).
struct Start {
  const float* data;
  int64_t row_step;
};

// Memory to be asked for while a tile computes: `step` bytes further with every k.
struct Ahead {
  const char* data;
  int64_t step;
};

struct TileArguments {
  int64_t depth;
  const float* a;
  int64_t a_step;
  Panels b;
  Start start;
  float* c;
  int64_t c_step;
  Ahead ahead;
};

// How a tile is computed where panels are float32; encoder/pairs.h has others.
struct FloatTile {
  template <int kRows, int kPanels>
  static void run(const TileArguments& t) {
    constexpr int kPerPanel = kPanel / kLanes;
    constexpr int kVectors = kPanels * kPerPanel;
    Vec sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = t.start.data != nullptr ? load(t.start.data + r * t.start.row_step + v * kLanes) : Vec{};
    const float* a = t.a;
    const float* b = t.b.data;
    const char* ahead = t.ahead.data;
    const int64_t a_step = t.a_step, b_step = t.b.step, b_stride = t.b.stride, ahead_step = t.ahead.step;
    for (int64_t k = t.depth; k > 0; --k, ++a, b += b_step, ahead += ahead_step) {
      __builtin_prefetch(ahead);
      Vec right[kVectors];
      for (int v = 0; v < kVectors; ++v)
        right[v] = load(b + (v / kPerPanel) * b_stride + (v % kPerPanel) * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const float left = a[r * a_step];
        for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(t.c + r * t.c_step + v * kLanes, sums[r][v]);
  }
};

using Tile = void (*)(const TileArguments&);

template <class Kernel>
struct TileTable {
  Tile tiles[kTilePanels][kTileRows];  // [panels - 1][rows - 1]

  constexpr TileTable() : tiles{} {
    fill<1>(std::make_integer_sequence<int, kTileRows>());
    fill<kTilePanels>(std::make_integer_sequence<int, kTileRows>());
  }
  template <int kPanels, int... kRow>
  constexpr void fill(std::integer_sequence<int, kRow...>) {
    ((tiles[kPanels - 1][kRow] = &Kernel::template run<kRow + 1, kPanels>), ...);
  }
};
template <class Kernel>
inline constexpr TileTable<Kernel> kTiles;

// `rows` cut into tiles of at most kTileRows, as even as can be: a tile of one row would spend its time
// waiting on its own sums.
template <class Body>
void for_row_tiles(int64_t rows, Body body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles;
    body(first, static_cast<int>(rows * (t + 1) / tiles - first));
  }
}

// The next panels, asked for in equal shares by the tiles of these. Pays with two to six tiles of weights
// that come from memory (one text: 80 to 92 GFLOP/s at 25 rows); with one tile there is no time to hide
// anything, with many the hardware's own prefetching is enough.
inline Ahead next_panels(int64_t rows, const Panels& b, int64_t next, int panels) {
  constexpr int64_t kLine = 64;
  if (next < 0 || b.step != kPanel) return {reinterpret_cast<const char*>(b.data), 0};
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t bytes = 4 * kPanel * panels / tiles;  // of the next panels, per k of each tile
  const bool pays = bytes <= kLine && bytes >= kLine / 4;
  return {reinterpret_cast<const char*>(b.data + next * b.stride), pays ? bytes : 0};
}

// `range` of the panels of c = start + a b, in tiles of Kernel; finish(row, rows, column, columns) is called
// on each tile of c as soon as it is stored, while it is in the first-level cache. after: what the last
// panels' tiles ask for.
template <class Kernel = FloatTile, class Finish>
void multiply(int64_t rows, int64_t depth, const float* a, int64_t a_step, Panels b, Range range, Start start,
              float* c, int64_t c_step, Finish finish, Ahead after = {nullptr, 0}) {
  for (int64_t panel = range.first; panel < range.last;) {
    const int panels = range.last - panel >= kTilePanels ? kTilePanels : 1;
    const int64_t column = panel * kPanel;
    const bool is_last = panel + panels >= range.last;
    Ahead ahead = is_last && after.data != nullptr
                      ? after
                      : next_panels(rows, b, is_last ? range.next : panel + panels, panels);
    for_row_tiles(rows, [&](int64_t row, int count) {
      kTiles<Kernel>.tiles[panels - 1][count - 1](
          {depth,
           a + row * a_step,
           a_step,
           {b.data + panel * b.stride, b.step, b.stride},
           {start.data == nullptr ? nullptr : start.data + row * start.row_step + column, start.row_step},
           c + row * c_step + column,
           c_step,
           ahead});
      ahead.data += depth * ahead.step;
      finish(row, count, column, panels * kPanel);
    });
    panel += panels;
  }
}

inline constexpr auto kNoFinish = [](int64_t, int, int64_t, int64_t) {};

}  // namespace dynplan::kernels::DYNPLAN_ISA
