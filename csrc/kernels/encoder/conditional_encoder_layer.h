// Post-norm encoder layers on the active rows of a packed batch, in place, on the CPU.
//
//   x1 = LayerNorm(x + Wo attention(x) + bo)
//   x2 = LayerNorm(x1 + W2 act(W1 x1 + b1) + b2)
//
// Layer l runs on rows[l, 0 .. active); attention stays inside the sequences of cu_seqlens[l]. Rows that are
// not listed are neither read nor written.
//
// Each output element is summed by one thread over its inner dimension in ascending order, whatever the
// blocking: same sample, same bits, for any batch around it and any number of threads.
//
// The whole encoder is one parallel range. Many samples flow through the layers piece by piece, each piece in
// the cache of one thread; few of them are shared by rows, or by columns of the weights (encoder/schedule.h).
#pragma once

#include <cstdint>

#include "kernels/encoder/activation.h"
#include "kernels/encoder/flow.h"
#include "kernels/encoder/packed_weights.h"
#include "kernels/encoder/phases.h"
#include "kernels/encoder/team.h"
#include "kernels/parallel.h"
#include "kernels/simd/isa.h"

namespace dynplan::kernels {

// How hidden states are stored. Arithmetic is float32 either way.
enum class RowType { float32, bfloat16 };

struct ConditionalEncoderParams {
  void* hidden;  // (T, H) of row_type, dense, updated in place
  RowType row_type;
  const int32_t* rows;        // (L, T), the first counts[l, 1] of each layer distinct and in [0, T)
  const int32_t* cu_seqlens;  // (L, B + 1)
  const int32_t* counts;      // (L, 2): active sequences, active rows
  const void* const* packed;  // (L), blobs of pack_encoder_weights
  int64_t layers;             // L
  int64_t capacity;           // T
  int64_t samples;            // B
  int64_t hidden_size;        // H
  int64_t intermediate_size;  // I
  int64_t heads;              // divides H
  Activation activation;
  float eps;
  int64_t workers = 1;           // threads the Parallel drives, at least 1
  float* workspace = nullptr;    // encoder_workspace_floats() of them
  PhaseTimes* phases = nullptr;  // added to, if given
  // If given, makes rows [begin, end) of `hidden` before the first layer; shared out as layers are.
  const RangeBody* fill = nullptr;
};

// At most this many active rows are shared out by columns of the weights, more by rows (encoder/schedule.h).
// Two threads, 128 rows by columns: 0.83 (width 768) and 0.95 (384) of the time by rows; 190 rows: 0.92
// and 1.04.
constexpr int64_t kFewRows = 128;

// Floats from one row of an internal buffer to the next. The odd line keeps the rows of a tile in different
// cache sets where the width is a power of two.
constexpr int64_t buffer_step(int64_t width) {
  return round_up(width, kPanel) + kPanel;
}

// Floats of workspace for at most `active` rows in any layer.
constexpr int64_t encoder_workspace_floats(int64_t active, int64_t hidden_size, int64_t intermediate_size) {
  const int64_t few = active < kFewRows ? active : kFewRows;
  return active * buffer_step(3 * hidden_size) +
         few * (2 * buffer_step(hidden_size) + buffer_step(intermediate_size));
}

// Rows of a block, whose buffers take 2 MB. Measured at widths 384 and 768: 256 KB to 1 MB cost up to 20 % at
// 768, where few rows share each pass over the weights; 4 MB gains nothing.
constexpr int64_t block_rows(int64_t hidden_size, int64_t intermediate_size) {
  const int64_t rows = (1 << 19) / (buffer_step(intermediate_size) + 2 * buffer_step(hidden_size));
  return rows < kPanel ? kPanel : rows;
}

// Samples flow where a thread's share of a layer is at least twice this many rows.
constexpr int64_t kFlowRows = 48;

// Most stages that a team goes through in one layer, and before the first.
constexpr int64_t kLayerStages = 8, kFillStages = 1;

// Rows that are worth waking a thread for to have them filled.
constexpr int64_t kFillGrain = 64;

// How threads share the work; one of the two is null.
struct Sharing {
  Flow* flow;
  const Team* team;
};

DYNPLAN_PER_ISA(void conditional_encoder(const ConditionalEncoderParams& p, Sharing sharing,
                                         Parallel parallel))

inline void conditional_encoder(const ConditionalEncoderParams& p, Sharing sharing, Parallel parallel,
                                CpuIsa isa) {
  DYNPLAN_ON_ISA(isa, conditional_encoder(p, sharing, parallel));
}

inline void conditional_encoder(const ConditionalEncoderParams& p, Parallel parallel,
                                CpuIsa isa = cpu_isa()) {
  const auto together = [&] {
    const Team team(kFillStages + kLayerStages * p.layers, p.workers);
    conditional_encoder(p, {.flow = nullptr, .team = &team}, parallel, isa);
  };
  // Too few rows for the question below: one short text, which the answer would cost more than it may.
  if (p.workers > 1 && p.capacity < 2 * kFlowRows * p.workers) return together();
  const DispatchView dispatch = {p.rows, p.cu_seqlens, p.counts, p.layers, p.capacity, p.samples};
  const int64_t most = block_rows(p.hidden_size, p.intermediate_size);
  Flow flow(dispatch, [&](int64_t active) {
    return std::clamp<int64_t>(p.workers == 1 ? most : active / (2 * p.workers), kFlowRows, most);
  });
  // A sample that is much of the work would keep one thread busy and the others waiting.
  const bool flows =
      flow.layers() > 0 &&
      (p.workers == 1 || (flow.work() >= 2 * kFlowRows * p.workers * flow.layers() &&
                          4 * p.workers * flow.chain() <= 3 * flow.work() && !flow.regroups()));
  if (!flows) return together();
  if (p.fill != nullptr) parallel(p.capacity, kFillGrain, *p.fill);
  conditional_encoder(p, {.flow = &flow, .team = nullptr}, parallel, isa);
}

}  // namespace dynplan::kernels
