// The encoder layer from products, attention and norms, and its two ways to share work between threads:
//
//   by rows     many rows: a range owns row tiles and carries them from the attention's output to the end of
//               the layer, in blocks whose activations stay in cache; two barriers a layer.
//   by columns  few rows (one short text): a range owns panels of each weight, so that no weight is streamed
//               from memory twice; a barrier after each product.
//
// Included once per instruction set (isa/conditional_encoder_layer_*.cpp).
#pragma once

#include <atomic>

#include "kernels/conditional_encoder_layer.h"
#include "kernels/encoder/attention.h"
#include "kernels/encoder/scratch.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Buffers of a block of rows, bytes. Measured at widths 384 and 768: 256 KB to 1 MB cost up to 20 % at 768,
// where few rows share each pass over the weights; 4 MB gains nothing.
constexpr int64_t kBlockBytes = 2 * 1024 * 1024;

// Rows of a block of the QKV product.
constexpr int64_t kGatherRows = 192;

struct Layer {
  const ConditionalEncoderParams& p;
  PackedLayout at;
  const float* weights;
  const int32_t* rows;
  const int32_t* cu_seqlens;
  int64_t sequences, active;
  int64_t row_step, qkv_step, up_step;  // floats between rows of hidden-wide, QKV and feed-forward buffers
};

inline Layer layer_of(const ConditionalEncoderParams& p, int64_t index) {
  return {p,
          PackedLayout(p.hidden_size, p.intermediate_size),
          reinterpret_cast<const float*>(static_cast<const char*>(p.packed[index]) + sizeof(PackedHeader)),
          p.rows + index * p.capacity,
          p.cu_seqlens + index * (p.samples + 1),
          p.counts[2 * index],
          p.counts[2 * index + 1],
          buffer_step(p.hidden_size),
          buffer_step(3 * p.hidden_size),
          buffer_step(p.intermediate_size)};
}

// One active row into float32, and back.
inline void gather_row(const Layer& l, int64_t index, float* out) {
  const int64_t h = l.p.hidden_size, at = l.rows[index] * h;
  if (l.p.row_type == RowType::float32) {
    std::memcpy(out, static_cast<const float*>(l.p.hidden) + at, 4 * h);
  } else {
    const BFloat16* row = static_cast<const BFloat16*>(l.p.hidden) + at;
    for (int64_t i = 0; i < h; ++i) out[i] = to_float(row[i]);
  }
}

inline void scatter_row(const Layer& l, int64_t index, const float* row) {
  const int64_t h = l.p.hidden_size, at = l.rows[index] * h;
  if (l.p.row_type == RowType::float32) {
    std::memcpy(static_cast<float*>(l.p.hidden) + at, row, 4 * h);
  } else {
    BFloat16* out = static_cast<BFloat16*>(l.p.hidden) + at;
    for (int64_t i = 0; i < h; ++i) out[i] = to_bfloat16(row[i]);
  }
}

// x = (x - mean) / sqrt(variance + eps) * weight + bias over the first n, in place.
inline void normalise_row(float* x, int64_t n, const float* weight, const float* bias, float eps) {
  const int64_t whole = n / kLanes * kLanes;
  Vec sums[2] = {};
  for (int64_t i = 0; i < whole; i += kLanes) sums[i / kLanes % 2] += load(x + i);
  float total = sum(sums[0] + sums[1]);
  for (int64_t i = whole; i < n; ++i) total += x[i];
  const float mean = total / static_cast<float>(n);

  Vec squares[2] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec d = load(x + i) - mean;
    squares[i / kLanes % 2] += d * d;
  }
  float variance = sum(squares[0] + squares[1]);
  for (int64_t i = whole; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  variance /= static_cast<float>(n);

  const float rstd = 1.f / __builtin_sqrtf(variance + eps);
  for (int64_t i = 0; i < whole; i += kLanes)
    store(x + i, (load(x + i) - mean) * rstd * load(weight + i) + load(bias + i));
  for (int64_t i = whole; i < n; ++i) x[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
}

template <class F>
void map_tile(float* c, int64_t step, int rows, int64_t columns, F f) {
  for (int r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += kLanes) store(c + r * step + i, f(load(c + r * step + i)));
}

inline void activate_tile(Activation activation, float* c, int64_t step, int rows, int64_t columns) {
  switch (activation) {
    case Activation::gelu:
      return map_tile(c, step, rows, columns, [](Vec x) { return gelu(x); });
    case Activation::gelu_tanh:
      return map_tile(c, step, rows, columns, [](Vec x) { return gelu_tanh(x); });
    case Activation::relu:
      return map_tile(c, step, rows, columns, [](Vec x) { return relu(x); });
    case Activation::silu:
      return map_tile(c, step, rows, columns, [](Vec x) { return silu(x); });
  }
}

inline void add_tile(float* c, int64_t step, const float* other, int64_t other_step, int rows,
                     int64_t columns) {
  for (int r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += kLanes)
      store(c + r * step + i, load(c + r * step + i) + load(other + r * other_step + i));
}

// Active rows begin, begin + 1, ... into a hidden-wide buffer.
inline void gather_rows(const Layer& l, int64_t begin, int64_t rows, float* x) {
  const PhaseTimer timer(l.p.phases, Phase::gather);
  for (int64_t r = 0; r < rows; ++r) gather_row(l, begin + r, x + r * l.row_step);
}

// The four products of a layer on `rows` rows, panels [first, last) of each. x, y: hidden-wide buffers.

inline void project_qkv(const Layer& l, int64_t rows, const float* x, float* qkv, int64_t first,
                        int64_t last) {
  const PhaseTimer timer(l.p.phases, Phase::qkv);
  const int64_t h = l.p.hidden_size;
  multiply(rows, h, x, l.row_step, {l.weights + l.at.qkv, kPanel, h * kPanel}, first, last,
           {l.weights + l.at.qkv_bias, 0}, qkv, l.qkv_step, kNoFinish);
}

// y = x + Wo context + bo
inline void project_context(const Layer& l, int64_t rows, const float* context, const float* x, float* y,
                            int64_t first, int64_t last) {
  const PhaseTimer timer(l.p.phases, Phase::output);
  const int64_t h = l.p.hidden_size, step = l.row_step;
  multiply(rows, h, context, l.qkv_step, {l.weights + l.at.output, kPanel, h * kPanel}, first, last,
           {l.weights + l.at.output_bias, 0}, y, step,
           [=](int64_t row, int count, int64_t column, int64_t columns) {
             add_tile(y + row * step + column, step, x + row * step + column, step, count, columns);
           });
}

// up = act(W1 y + b1)
inline void expand(const Layer& l, int64_t rows, const float* y, float* up, int64_t first, int64_t last) {
  const PhaseTimer timer(l.p.phases, Phase::up);
  const int64_t h = l.p.hidden_size;
  multiply(rows, h, y, l.row_step, {l.weights + l.at.up, kPanel, h * kPanel}, first, last,
           {l.weights + l.at.up_bias, 0}, up, l.up_step,
           [&](int64_t row, int count, int64_t column, int64_t columns) {
             activate_tile(l.p.activation, up + row * l.up_step + column, l.up_step, count, columns);
           });
}

// x = y + W2 up + b2
inline void contract(const Layer& l, int64_t rows, const float* up, const float* y, float* x, int64_t first,
                     int64_t last) {
  const PhaseTimer timer(l.p.phases, Phase::down);
  const int64_t i = l.p.intermediate_size, step = l.row_step;
  multiply(rows, i, up, l.up_step, {l.weights + l.at.down, kPanel, i * kPanel}, first, last,
           {l.weights + l.at.down_bias, 0}, x, step,
           [=](int64_t row, int count, int64_t column, int64_t columns) {
             add_tile(x + row * step + column, step, y + row * step + column, step, count, columns);
           });
}

inline void first_norm(const Layer& l, int64_t rows, float* y) {
  const PhaseTimer timer(l.p.phases, Phase::norm1);
  for (int64_t r = 0; r < rows; ++r)
    normalise_row(y + r * l.row_step, l.p.hidden_size, l.weights + l.at.norm1_weight,
                  l.weights + l.at.norm1_bias, l.p.eps);
}

// Rows begin, begin + 1, ... of the active ones are done: x holds them before their norm.
inline void second_norm_and_scatter(const Layer& l, int64_t begin, int64_t rows, float* x) {
  const PhaseTimer timer(l.p.phases, Phase::norm2);
  for (int64_t r = 0; r < rows; ++r) {
    normalise_row(x + r * l.row_step, l.p.hidden_size, l.weights + l.at.norm2_weight,
                  l.weights + l.at.norm2_bias, l.p.eps);
    scatter_row(l, begin + r, x + r * l.row_step);
  }
}

// Hands out [0, units) to whoever asks, in pieces that shrink towards the end: a thread that the machine
// holds up takes fewer of them. Which thread takes which piece leaves no trace in the bits.
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

// [begin, end) in blocks of at most `most` rows, as even as can be.
template <class Body>
void for_blocks(int64_t begin, int64_t end, int64_t most, Body body) {
  const int64_t rows = end - begin, blocks = (rows + most - 1) / most;
  for (int64_t b = 0; b < blocks; ++b) body(begin + rows * b / blocks, begin + rows * (b + 1) / blocks);
}

// Attention of all sequences, cut into ranges of equal cost: a head of a sequence of n rows costs n (n + c),
// with c for what does not grow with n^2 (transposing keys, reading q, k and v).
inline void attend_all(const Layer& l, float* qkv, Parallel parallel) {
  constexpr int64_t kLinearCost = 32, kRanges = 128;
  int64_t total = 0, longest = 0;
  for (int64_t s = 0; s < l.sequences; ++s) {
    const int64_t n = l.cu_seqlens[s + 1] - l.cu_seqlens[s];
    total += n * (n + kLinearCost);
    longest = n > longest ? n : longest;
  }
  const AttentionShape shape = {l.p.hidden_size, l.p.heads, l.qkv_step, longest};
  total *= l.p.heads;
  share_out(kRanges, l.p.workers, parallel, [&](int64_t first, int64_t last) {
    const PhaseTimer timer(l.p.phases, Phase::attention);
    float* scratch = thread_scratch(attention_scratch_floats(shape));
    const int64_t from = total / kRanges * first + total % kRanges * first / kRanges;
    const int64_t to = total / kRanges * last + total % kRanges * last / kRanges;
    int64_t cost = 0;  // of everything before (s, head): the pair is ours when it starts in [from, to)
    for (int64_t s = 0; s < l.sequences && cost < to; ++s) {
      const int64_t begin = l.cu_seqlens[s], n = l.cu_seqlens[s + 1] - begin, each = n * (n + kLinearCost);
      if (n == 0) continue;
      if (cost + each * l.p.heads <= from) {
        cost += each * l.p.heads;
        continue;
      }
      for (int64_t head = 0; head < l.p.heads; ++head, cost += each)
        if (cost >= from && cost < to) attend(qkv + begin * l.qkv_step, n, head, shape, scratch);
    }
  });
}

inline void run_by_rows(const Layer& l, float* qkv, Parallel parallel) {
  const int64_t tiles = (l.active + kTileRows - 1) / kTileRows;
  const auto row = [&](int64_t tile) { return l.active * tile / tiles; };
  const int64_t panels = round_up(l.p.hidden_size, kPanel) / kPanel;
  const int64_t up_panels = round_up(l.p.intermediate_size, kPanel) / kPanel;
  const int64_t qkv_panels = round_up(3 * l.p.hidden_size, kPanel) / kPanel;

  share_out(tiles, l.p.workers, parallel, [&](int64_t first, int64_t last) {
    float* x = thread_scratch(kGatherRows * l.row_step);
    for_blocks(row(first), row(last), kGatherRows, [&](int64_t begin, int64_t end) {
      gather_rows(l, begin, end - begin, x);
      project_qkv(l, end - begin, x, qkv + begin * l.qkv_step, 0, qkv_panels);
    });
  });
  attend_all(l, qkv, parallel);

  int64_t most = kBlockBytes / 4 / (l.up_step + 2 * l.row_step);
  if (most < kTileRows) most = kTileRows;
  share_out(tiles, l.p.workers, parallel, [&](int64_t first, int64_t last) {
    float* x = thread_scratch(most * (l.up_step + 2 * l.row_step));
    float* y = x + most * l.row_step;
    float* up = y + most * l.row_step;
    for_blocks(row(first), row(last), most, [&](int64_t begin, int64_t end) {
      const int64_t rows = end - begin;
      gather_rows(l, begin, rows, x);
      project_context(l, rows, qkv + begin * l.qkv_step, x, y, 0, panels);
      first_norm(l, rows, y);
      expand(l, rows, y, up, 0, up_panels);
      contract(l, rows, up, y, x, 0, panels);
      second_norm_and_scatter(l, begin, rows, x);
    });
  });
}

inline void run_by_columns(const Layer& l, float* qkv, Parallel parallel) {
  float* x = qkv + l.active * l.qkv_step;
  float* y = x + l.active * l.row_step;
  float* up = y + l.active * l.row_step;
  // A range is whole tiles wide.
  const auto over_panels = [&](int64_t columns, auto body) {
    const int64_t panels = round_up(columns, kPanel) / kPanel,
                  units = (panels + kTilePanels - 1) / kTilePanels;
    share_out(units, l.p.workers, parallel, [&](int64_t first, int64_t last) {
      body(first * kTilePanels, last == units ? panels : last * kTilePanels);
    });
  };
  gather_rows(l, 0, l.active, x);
  over_panels(3 * l.p.hidden_size,
              [&](int64_t first, int64_t last) { project_qkv(l, l.active, x, qkv, first, last); });
  attend_all(l, qkv, parallel);
  over_panels(l.p.hidden_size,
              [&](int64_t first, int64_t last) { project_context(l, l.active, qkv, x, y, first, last); });
  first_norm(l, l.active, y);
  over_panels(l.p.intermediate_size,
              [&](int64_t first, int64_t last) { expand(l, l.active, y, up, first, last); });
  over_panels(l.p.hidden_size,
              [&](int64_t first, int64_t last) { contract(l, l.active, up, y, x, first, last); });
  second_norm_and_scatter(l, 0, l.active, x);
}

void conditional_encoder(const ConditionalEncoderParams& p, Parallel parallel) {
  for (int64_t index = 0; index < p.layers; ++index) {
    const Layer l = layer_of(p, index);
    if (l.active == 0) continue;
    if (l.active <= kFewRows)
      run_by_columns(l, p.workspace, parallel);
    else
      run_by_rows(l, p.workspace, parallel);
  }
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
