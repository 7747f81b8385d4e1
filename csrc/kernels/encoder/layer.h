// The parts of an encoder layer on a block of active rows: gather, products, norms, scatter. Who runs them on
// which rows is the business of schedule.h.
#pragma once

#include "kernels/encoder/attention.h"
#include "kernels/encoder/conditional_encoder_layer.h"
#include "kernels/encoder/pairs.h"

namespace dynplan::kernels::DYNPLAN_ISA {

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
  const WeightType type = static_cast<const PackedHeader*>(p.packed[index])->type;
  return {p,
          PackedLayout(type, p.hidden_size, p.intermediate_size),
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

// kRows rows, each x = (x - mean) / sqrt(variance + eps) * weight + bias over its first n, in place. What a
// row comes to does not depend on those beside it: they fill the time in which its sums wait for one another.
template <int kRows>
void normalise_rows(float* x, int64_t step, int64_t n, const float* weight, const float* bias, float eps) {
  const int64_t whole = n / kLanes * kLanes;
  float mean[kRows], rstd[kRows];
  // Over each row, of f(element): its sum over n.
  const auto average = [&](float(&out)[kRows], auto f) {
    Vec sums[kRows][2] = {};
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int r = 0; r < kRows; ++r) sums[r][i / kLanes % 2] += f(r, load(x + r * step + i));
    for (int r = 0; r < kRows; ++r) {
      float total = sum(sums[r][0] + sums[r][1]);
      for (int64_t i = whole; i < n; ++i) total += f(r, x[r * step + i]);
      out[r] = total / static_cast<float>(n);
    }
  };
  average(mean, [](int, auto value) { return value; });
  average(rstd, [&](int r, auto value) { return (value - mean[r]) * (value - mean[r]); });
  for (float& value : rstd) value = 1.f / __builtin_sqrtf(value + eps);

  for (int64_t i = 0; i < whole; i += kLanes)
    for (int r = 0; r < kRows; ++r)
      store(x + r * step + i,
            (load(x + r * step + i) - mean[r]) * rstd[r] * load(weight + i) + load(bias + i));
  for (int64_t i = whole; i < n; ++i)
    for (int r = 0; r < kRows; ++r)
      x[r * step + i] = (x[r * step + i] - mean[r]) * rstd[r] * weight[i] + bias[i];
}

inline void normalise_row(float* x, int64_t n, const float* weight, const float* bias, float eps) {
  normalise_rows<1>(x, 0, n, weight, bias, eps);
}

// Rows that are normed side by side.
constexpr int kNormRows = 4;

inline void normalise(float* x, int64_t step, int64_t rows, int64_t n, const float* weight, const float* bias,
                      float eps) {
  int64_t r = 0;
  for (; r + kNormRows <= rows; r += kNormRows)
    normalise_rows<kNormRows>(x + r * step, step, n, weight, bias, eps);
  for (; r < rows; ++r) normalise_row(x + r * step, n, weight, bias, eps);
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

// The left side of a product: rows of a hidden-wide or QKV buffer, or of the feed-forward.
inline Operand operand(const Layer& l, int64_t rows, const float* x, int64_t step) {
  return Operand(l.at.type, rows, l.p.hidden_size, x, step);
}
inline Operand up_operand(const Layer& l, int64_t rows, const float* up) {
  return Operand(l.at.type, rows, l.p.intermediate_size, up, l.up_step);
}

// The four products of a layer on `rows` rows, `panels` of each. x, y: hidden-wide buffers.

inline void project_qkv(const Layer& l, int64_t rows, const Operand& x, float* qkv, Range panels) {
  const PhaseTimer timer(l.p.phases, Phase::qkv);
  multiply_packed(l.at.type, rows, l.p.hidden_size, x, l.weights + l.at.qkv, panels,
                  l.weights + l.at.qkv_bias, qkv, l.qkv_step, kNoFinish);
}

// y = x + Wo context + bo
inline void project_context(const Layer& l, int64_t rows, const Operand& context, const float* x, float* y,
                            Range panels) {
  const PhaseTimer timer(l.p.phases, Phase::output);
  const int64_t step = l.row_step;
  multiply_packed(l.at.type, rows, l.p.hidden_size, context, l.weights + l.at.output, panels,
                  l.weights + l.at.output_bias, y, step,
                  [=](int64_t row, int count, int64_t column, int64_t columns) {
                    add_tile(y + row * step + column, step, x + row * step + column, step, count, columns);
                  });
}

// up = act(W1 y + b1)
inline void expand(const Layer& l, int64_t rows, const Operand& y, float* up, Range panels) {
  const PhaseTimer timer(l.p.phases, Phase::up);
  multiply_packed(l.at.type, rows, l.p.hidden_size, y, l.weights + l.at.up, panels, l.weights + l.at.up_bias,
                  up, l.up_step, [&](int64_t row, int count, int64_t column, int64_t columns) {
                    activate_tile(l.p.activation, up + row * l.up_step + column, l.up_step, count, columns);
                  });
}

// x = y + W2 up + b2
inline void contract(const Layer& l, int64_t rows, const Operand& up, const float* y, float* x,
                     Range panels) {
  const PhaseTimer timer(l.p.phases, Phase::down);
  const int64_t step = l.row_step;
  multiply_packed(l.at.type, rows, l.p.intermediate_size, up, l.weights + l.at.down, panels,
                  l.weights + l.at.down_bias, x, step,
                  [=](int64_t row, int count, int64_t column, int64_t columns) {
                    add_tile(x + row * step + column, step, y + row * step + column, step, count, columns);
                  });
}

inline void first_norm(const Layer& l, int64_t rows, float* y) {
  const PhaseTimer timer(l.p.phases, Phase::norm1);
  normalise(y, l.row_step, rows, l.p.hidden_size, l.weights + l.at.norm1_weight, l.weights + l.at.norm1_bias,
            l.p.eps);
}

// Rows begin, begin + 1, ... of the active ones are done: x holds them before their norm. stay: the next
// layer finds them there.
inline void second_norm_and_scatter(const Layer& l, int64_t begin, int64_t rows, float* x,
                                    bool stay = false) {
  const PhaseTimer timer(l.p.phases, Phase::norm2);
  normalise(x, l.row_step, rows, l.p.hidden_size, l.weights + l.at.norm2_weight, l.weights + l.at.norm2_bias,
            l.p.eps);
  if (stay) return;
  for (int64_t r = 0; r < rows; ++r) scatter_row(l, begin + r, x + r * l.row_step);
}

// Everything after the attention, of rows begin, begin + 1, ... of the active ones. x holds the rows and is
// overwritten, as y and up are; up may be the very rows of qkv.
inline void finish_rows(const Layer& l, int64_t begin, int64_t rows, const float* qkv, float* x, float* y,
                        float* up) {
  const Range all = all_panels(l.p.hidden_size);
  project_context(l, rows, operand(l, rows, qkv, l.qkv_step), x, y, all);
  first_norm(l, rows, y);
  expand(l, rows, operand(l, rows, y, l.row_step), up, all_panels(l.p.intermediate_size));
  contract(l, rows, up_operand(l, rows, up), y, x, all);
  second_norm_and_scatter(l, begin, rows, x);
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
