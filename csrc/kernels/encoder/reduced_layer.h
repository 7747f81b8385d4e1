// The encoder layer round products in int8 (reduced_encoder.h), in two ways:
//
//   by rows   many rows: a range owns blocks of rows and carries each through the products of the layer; a
//             product runs on the range's own thread, and what it leaves stays in the second-level cache.
//   together  few rows: a product for all threads at once, then its rows shared out.
//
// Each stage is a parallel range of its own: unlike what schedule.h runs, a library's product may throw, and
// then nobody must be left waiting.
//
// Included once per instruction set, after schedule.h.
#pragma once

#include "kernels/encoder/reduced_encoder.h"
#include "kernels/encoder/schedule.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Rows of a block. Each product call reorders its weight for the library's kernel, which asks for many rows;
// its sums should not outgrow the second-level cache, which asks for few. Measured at width 384: 128 rows
// cost 5 to 10 %, 256 gain nothing.
constexpr int64_t kReducedRows = 192;

// With so many threads that blocks would run out they are smaller, down to this.
constexpr int64_t kReducedLeastRows = 64;

typedef int8_t ByteVec __attribute__((vector_size(kLanes), aligned(1), may_alias));

// Returns the row's scale. A row with NaN or infinity in it gets such a scale.
inline float encode_row(const float* x, int64_t n, int8_t* out) {
  // 1.5 * 2^23: the low byte of a sum with it is the integer nearest to what was added.
  constexpr float kRound = 12582912.f;
  const int64_t whole = n / kLanes * kLanes;
  // Magnitudes compare as integers as they do as floats, and NaN is larger than all of them.
  IntVec lanes{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const IntVec magnitude = *reinterpret_cast<const IntVec*>(x + i) & 0x7fffffff;
    lanes = magnitude > lanes ? magnitude : lanes;
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = lanes[i] > bits ? lanes[i] : bits;
  for (int64_t i = whole; i < n; ++i) {
    int32_t magnitude;
    std::memcpy(&magnitude, x + i, 4);
    magnitude &= 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  float most;
  std::memcpy(&most, &bits, 4);
  const bool nothing = most < kReducedSmallest;
  const float step = nothing ? 0.f : kRowLevels / most;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec rounded = load(x + i) * step + kRound;
    *reinterpret_cast<ByteVec*>(out + i) =
        __builtin_convertvector(reinterpret_cast<const IntVec&>(rounded), ByteVec);
  }
  for (int64_t i = whole; i < n; ++i) {
    const float rounded = x[i] * step + kRound;
    std::memcpy(out + i, &rounded, 1);  // little-endian, as every CPU this is built for
  }
  return nothing ? 0.f : most / kRowLevels;
}

inline Vec decode_vector(const int32_t* sums, float row_scale, const float* scales) {
  const IntVec whole = *reinterpret_cast<const IntVec*>(sums);
  return __builtin_convertvector(whole, Vec) * (row_scale * load(scales));
}

// Hands out [0, units) in pieces that shrink towards the end, as Member does.
template <class Body>
void share_out(int64_t units, int64_t workers, Parallel parallel, Body body) {
  std::atomic<int64_t> next{0};
  parallel(workers, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.load(std::memory_order_relaxed); begin < units;) {
      const int64_t fair = workers == 1 ? units : (units - begin) / (2 * workers);
      const int64_t end = begin + (fair < 1 ? 1 : fair);
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      body(begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  });
}

inline void attend_all(const Layer& l, float* qkv, Parallel parallel) {
  const int64_t floats = attention_scratch_floats(attention_shape(l, longest_sequence(l)));
  const Team team(1, l.p.workers);
  parallel(l.p.workers, 1, [&](int64_t, int64_t) {
    float* scratch = thread_scratch(floats);  // before the stage: nothing in it may throw
    Member member(team);
    attend_all(l, member, qkv, scratch);
  });
}

// A thread's line for one decoded row, beside the buffers of its block.
inline float* thread_line(int64_t floats) {
  thread_local ThreadScratch scratch;
  return scratch.at_least(floats);
}

struct ReducedLayer {
  Layer rows;
  ReducedLayout at;
  const char* blob;
  ReducedProduct product;

  const float* floats(int64_t place) const { return reinterpret_cast<const float*>(blob + place); }
  // Of an encoded row: the widest operand of a product; and of the sums that come out.
  int64_t operand_width() const { return at.down.depth > at.qkv.depth ? at.down.depth : at.qkv.depth; }
  int64_t sums_width() const { return at.qkv.columns > at.up.columns ? at.qkv.columns : at.up.columns; }
};

// Consecutive active rows on their way through a layer, and who works on them.
struct Block {
  const ReducedLayer& l;
  int64_t begin, count;
  int64_t workers;
  Parallel parallel;
  float *x, *y;     // (count, row_step): the layer's input, and the state after its first norm
  float* scales;    // (count): of the encoded rows
  int8_t* operand;  // (count, depth): encoded rows, dense
  int32_t* sums;    // (count, columns), dense: what a product leaves

  template <class Body>
  void each_row(Body body) const {
    share_out(count, workers, parallel, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) body(r);
    });
  }

  void encode(int64_t r, const float* row, int64_t width) const {
    scales[r] = encode_row(row, width, operand + r * width);
  }

  // out = the r-th row of the product, with its bias. Vectors may run past the end, into the padding of
  // `out`.
  void decode(const ReducedMatrix& m, int64_t r, float* out) const {
    const float *channel = l.floats(m.scales), *bias = l.floats(m.bias), scale = scales[r];
    const int32_t* row = sums + r * m.columns;
    for (int64_t i = 0; i < m.columns; i += kLanes)
      store(out + i, decode_vector(row + i, scale, channel + i) + load(bias + i));
  }

  // The product of the encoded rows with a weight, then finish(r, row) for each row, in any order. A row is
  // decoded into out + r * step, or into a line of the thread's own where out is null.
  template <class Finish>
  void multiply(const ReducedMatrix& m, float* out, int64_t step, Finish finish) const {
    l.product(count, m.columns, m.depth, operand, reinterpret_cast<const int8_t*>(l.blob + m.elements), sums);
    each_row([&](int64_t r) {
      float* row = out != nullptr ? out + r * step : thread_line(buffer_step(m.columns));
      decode(m, r, row);
      finish(r, row);
    });
  }

  void gather() const {
    const PhaseTimer timer(l.rows.p.phases, Phase::gather);
    each_row([&](int64_t r) { gather_row(l.rows, begin + r, x + r * l.rows.row_step); });
  }

  // x has been gathered. qkv: of all active rows.
  void project(float* qkv) const {
    const PhaseTimer timer(l.rows.p.phases, Phase::qkv);
    const int64_t step = l.rows.qkv_step;
    each_row([&](int64_t r) { encode(r, x + r * l.rows.row_step, l.at.qkv.depth); });
    multiply(l.at.qkv, qkv + begin * step, step, [](int64_t, float*) {});
  }

  // x = the layer's input, qkv = the context of attention; what comes out is scattered.
  void complete(const float* qkv) const {
    const Layer& rows = l.rows;
    const int64_t h = rows.p.hidden_size, step = rows.row_step, i = rows.p.intermediate_size;
    {
      const PhaseTimer timer(rows.p.phases, Phase::output);
      each_row([&](int64_t r) { encode(r, qkv + (begin + r) * rows.qkv_step, h); });
      multiply(l.at.output, y, step, [&](int64_t r, float* row) {
        add_tile(row, step, x + r * step, step, 1, h);
        normalise_row(row, h, l.floats(l.at.norm1_weight), l.floats(l.at.norm1_bias), rows.p.eps);
        encode(r, row, h);
      });
    }
    {
      const PhaseTimer timer(rows.p.phases, Phase::up);
      multiply(l.at.up, nullptr, 0, [&](int64_t r, float* row) {
        activate_tile(rows.p.activation, row, 0, 1, i);
        encode(r, row, i);
      });
    }
    const PhaseTimer timer(rows.p.phases, Phase::down);
    multiply(l.at.down, nullptr, 0, [&](int64_t r, float* row) {
      add_tile(row, step, y + r * step, step, 1, h);
      normalise_row(row, h, l.floats(l.at.norm2_weight), l.floats(l.at.norm2_bias), rows.p.eps);
      scatter_row(rows, begin + r, row);
    });
  }
};

// Floats that hold n objects of T, with a vector to read past their end.
template <class T>
constexpr int64_t floats_of(int64_t n) {
  return round_up(n * static_cast<int64_t>(sizeof(T)) / 4 + 1, kPanel) + kPanel;
}

// A block on the calling thread alone, its buffers in the thread's scratch.
inline Block own_block(const ReducedLayer& l, int64_t begin, int64_t count) {
  const int64_t wide = count * l.rows.row_step, operand = floats_of<int8_t>(count * l.operand_width());
  float* at = thread_scratch(2 * wide + round_up(count, kPanel) + operand +
                             floats_of<int32_t>(count * l.sums_width()));
  const auto take = [&at](int64_t floats) { return (at += floats) - floats; };
  float *x = take(wide), *y = take(wide), *scales = take(round_up(count, kPanel));
  int8_t* encoded = reinterpret_cast<int8_t*>(take(operand));
  return {l, begin, count, 1, serial, x, y, scales, encoded, reinterpret_cast<int32_t*>(at)};
}

inline void reduced_by_rows(const ReducedLayer& l, float* qkv, Parallel parallel) {
  const int64_t active = l.rows.active, workers = l.rows.p.workers;
  int64_t blocks = (active + kReducedRows - 1) / kReducedRows;
  if (blocks < 2 * workers) {
    const int64_t most = (active + kReducedLeastRows - 1) / kReducedLeastRows;
    blocks = most < 2 * workers ? most : 2 * workers;
  }
  const auto each_block = [&](auto body) {
    share_out(blocks, workers, parallel, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t begin = active * b / blocks;
        const Block block = own_block(l, begin, active * (b + 1) / blocks - begin);
        block.gather();
        body(block);
      }
    });
  };
  each_block([&](const Block& block) { block.project(qkv); });
  attend_all(l.rows, qkv, parallel);
  each_block([&](const Block& block) { block.complete(qkv); });
}

inline void reduced_together(const ReducedLayer& l, float* qkv, Parallel parallel) {
  const int64_t count = l.rows.active;
  float* at = qkv + count * l.rows.qkv_step;
  const auto take = [&at](int64_t floats) { return (at += floats) - floats; };
  float *x = take(count * l.rows.row_step), *y = take(count * l.rows.row_step), *scales = take(count);
  int8_t* operand = reinterpret_cast<int8_t*>(take(floats_of<int8_t>(count * l.operand_width())));
  const Block block = {l, 0, count,  l.rows.p.workers, parallel,
                       x, y, scales, operand,          reinterpret_cast<int32_t*>(at)};
  block.gather();
  block.project(qkv);
  attend_all(l.rows, qkv, parallel);
  block.complete(qkv);
}

void reduced_encoder(const ConditionalEncoderParams& p, ReducedProduct product, Parallel parallel) {
  for (int64_t index = 0; index < p.layers; ++index) {
    const ReducedLayer l = {layer_of(p, index), ReducedLayout(p.hidden_size, p.intermediate_size),
                            static_cast<const char*>(p.packed[index]), product};
    if (l.rows.active == 0) continue;
    if (l.rows.active <= kFewReducedRows)
      reduced_together(l, p.workspace, parallel);
    else
      reduced_by_rows(l, p.workspace, parallel);
  }
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
