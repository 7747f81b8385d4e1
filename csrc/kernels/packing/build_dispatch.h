// The dispatch of one layer or of all layers, on the CPU.
//
// For layer l, the active samples are those b with keep[b, l], in ascending order:
//   rows[l, :]       the packed rows of the active samples, end to end; -1 beyond the last
//   cu_seqlens[l, :] offsets of the active samples into rows[l, :]; the last offset repeated to the end
//   counts[l, :]     number of active samples, number of active rows
//
// Parallel over layers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/parallel.h"
#include "kernels/packing/truth.h"

namespace dynplan::kernels {

struct BuildDispatchParams {
  const Truth* keep;          // keep[b * sample_stride + l * layer_stride]
  int64_t sample_stride;
  int64_t layer_stride;
  const int32_t* cu_seqlens;  // (samples + 1,), ascending from 0, last at most capacity
  int64_t samples;            // B
  int64_t layers;             // L
  int64_t capacity;           // T
  int32_t* rows;              // (L, T)
  int32_t* active_cu_seqlens; // (L, B + 1)
  int32_t* counts;            // (L, 2)
};

inline void build_dispatch(const BuildDispatchParams& p, Parallel parallel) {
  parallel(p.layers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t layer = begin; layer < end; ++layer) {
      int32_t* rows = p.rows + layer * p.capacity;
      int32_t* offsets = p.active_cu_seqlens + layer * (p.samples + 1);
      int32_t active = 0;
      int32_t filled = 0;
      offsets[0] = 0;
      for (int64_t b = 0; b < p.samples; ++b) {
        if (!is_set(p.keep[b * p.sample_stride + layer * p.layer_stride])) continue;
        for (int32_t row = p.cu_seqlens[b]; row < p.cu_seqlens[b + 1]; ++row) rows[filled++] = row;
        offsets[++active] = filled;
      }
      std::fill(offsets + active + 1, offsets + p.samples + 1, filled);
      std::fill(rows + filled, rows + p.capacity, -1);
      p.counts[2 * layer] = active;
      p.counts[2 * layer + 1] = filled;
    }
  });
}

}  // namespace dynplan::kernels
