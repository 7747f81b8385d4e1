// Matrix products with a right-hand side in panels of 16 columns.
//
//   c[r, n] = start[r, n] + sum_k a[r, k] b[k, n]
//
// The inner product keeps a tile of c in registers for the whole of k: kTileRows rows of a are read one
// element at a time and broadcast, so a needs no packing, and its rows stay in the first-level cache while
// panels stream past. The sum over k is one chain per element, in order: the bits do not depend on the tile
// an element falls into.
#pragma once

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

// What a tile starts from: a row to be repeated (row_step 0), a matrix, or nothing (null).
struct Start {
  const float* data;
  int64_t row_step;
};

template <int kRows, int kPanels>
void tile(int64_t depth, const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t b_stride,
          const float* start, int64_t start_step, float* c, int64_t c_step) {
  constexpr int kPerPanel = kPanel / kLanes;
  constexpr int kVectors = kPanels * kPerPanel;
  Vec sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = start != nullptr ? load(start + r * start_step + v * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k, b += b_step) {
    Vec right[kVectors];
    for (int v = 0; v < kVectors; ++v)
      right[v] = load(b + (v / kPerPanel) * b_stride + (v % kPerPanel) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const float left = a[r * a_step + k];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(c + r * c_step + v * kLanes, sums[r][v]);
}

using Tile = void (*)(int64_t, const float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t,
                      float*, int64_t);

// kTiles[panels - 1][rows - 1]
template <int kPanels, int... kRow>
constexpr void fill_tiles(Tile (&out)[kTileRows], std::integer_sequence<int, kRow...>) {
  ((out[kRow] = &tile<kRow + 1, kPanels>), ...);
}

struct TileTable {
  Tile tiles[kTilePanels][kTileRows];
  constexpr TileTable() : tiles{} {
    fill_tiles<1>(tiles[0], std::make_integer_sequence<int, kTileRows>());
    fill_tiles<kTilePanels>(tiles[kTilePanels - 1], std::make_integer_sequence<int, kTileRows>());
  }
};
inline constexpr TileTable kTiles;

// `rows` cut into tiles of at most kTileRows, as even as can be: a tile of one row would waste most of its
// time waiting on its own sums.
template <class Body>
void for_row_tiles(int64_t rows, Body body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles;
    body(first, static_cast<int>(rows * (t + 1) / tiles - first));
  }
}

// Panels [first, last) of c = start + a b; finish(row, rows, column, columns) is called on each tile of c as
// soon as it is stored, while it is in the first-level cache.
template <class Finish>
void multiply(int64_t rows, int64_t depth, const float* a, int64_t a_step, Panels b, int64_t first,
              int64_t last, Start start, float* c, int64_t c_step, Finish finish) {
  for (int64_t panel = first; panel < last;) {
    const int panels = last - panel >= kTilePanels ? kTilePanels : 1;
    const int64_t column = panel * kPanel;
    for_row_tiles(rows, [&](int64_t row, int count) {
      const float* from = start.data == nullptr ? nullptr : start.data + row * start.row_step + column;
      kTiles.tiles[panels - 1][count - 1](depth, a + row * a_step, a_step, b.data + panel * b.stride, b.step,
                                          b.stride, from, start.row_step, c + row * c_step + column, c_step);
      finish(row, count, column, panels * kPanel);
    });
    panel += panels;
  }
}

inline constexpr auto kNoFinish = [](int64_t, int, int64_t, int64_t) {};

}  // namespace dynplan::kernels::DYNPLAN_ISA
