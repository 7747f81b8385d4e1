// Attention of one sequence and one head, out of and into the rows of the fused QKV product.
//
//   context[i] = sum_j softmax_j(q[i] . k[j] / sqrt(d)) v[j]
//
// Keys are transposed into panels once, so both products are those of product.h. A tile of queries at a time
// meets blocks of kKeyBlock keys with a running maximum and sum, so scores never outgrow the first-level
// cache. The context overwrites the head's queries: no other (sequence, head) reads them.
#pragma once

#include "kernels/encoder/phases.h"
#include "kernels/encoder/product.h"

namespace dynplan::kernels::DYNPLAN_ISA {

constexpr int64_t kKeyBlock = 512;

struct AttentionShape {
  int64_t hidden_size;  // H: q, k and v start at columns 0, H and 2 H of a row
  int64_t heads;
  int64_t row_step;  // floats from one row of QKV to the next
  int64_t longest;   // rows of the longest sequence
  PhaseTimes* phases = nullptr;
  int64_t depth() const { return hidden_size / heads; }
  int64_t padded_depth() const { return round_up(depth(), kPanel); }
};

inline int64_t attention_scratch_floats(const AttentionShape& s) {
  const int64_t keys = round_up(s.longest, kPanel);
  return keys * s.depth() + keys * s.padded_depth() + kTileRows * (kKeyBlock + kPanel + s.padded_depth());
}

// panels[j / 16][d][j % 16] = keys[j, d], zeros beyond the last key.
inline void transpose_keys(const float* keys, int64_t row_step, int64_t length, int64_t depth,
                           float* panels) {
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t begin = 0; begin < length; begin += kPanel, panels += depth * kPanel)
    for (int64_t side = 0; side < kPanel; side += kLanes) {
      const float* first = keys + (begin + side) * row_step;
      const int64_t left = length - begin - side;
      for (int64_t d = 0; d < whole; d += kLanes) {
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) block[j] = j < left ? load(first + j * row_step + d) : Vec{};
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panels + (d + i) * kPanel + side, block[i]);
      }
      for (int64_t d = whole; d < depth; ++d)
        for (int64_t j = 0; j < kLanes; ++j)
          panels[d * kPanel + side + j] = j < left ? first[j * row_step + d] : 0.f;
    }
}

// A row of scores becomes e^(scale (score - maximum)); returns their sum. `columns` is a multiple of kPanel.
inline float exponentiate(float* scores, int64_t columns, float maximum, float scale) {
  Vec total{};
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Vec e = exp((load(scores + c) - maximum) * scale);
    store(scores + c, e);
    total += e;
  }
  return sum(total);
}

inline float row_maximum(const float* scores, int64_t columns) {
  Vec best = load(scores);
  for (int64_t c = kLanes; c < columns; c += kLanes) best = maximum(best, load(scores + c));
  return maximum(best);
}

inline void attend(float* qkv, int64_t length, int64_t head, const AttentionShape& s, float* scratch) {
  constexpr float kNothing = -3e38f;
  constexpr int64_t kScoreStep =
      kKeyBlock + kPanel;  // not a multiple of 4096 bytes: rows would share cache sets
  const int64_t depth = s.depth(), padded = s.padded_depth();
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(depth));
  float* queries = qkv + head * depth;
  const float* keys = queries + s.hidden_size;
  const float* values = keys + s.hidden_size;

  float* key_panels = scratch;
  float* value_rows = key_panels + round_up(length, kPanel) * depth;
  float* scores = value_rows + round_up(length, kPanel) * padded;
  float* context = scores + kTileRows * kScoreStep;

  transpose_keys(keys, s.row_step, length, depth, key_panels);
  Panels v_panels = {values, s.row_step, kPanel};
  if (depth != padded) {  // whole vectors of v would run into the next head's columns
    for (int64_t j = 0; j < length; ++j)
      for (int64_t d = 0; d < padded; ++d)
        value_rows[j * padded + d] = d < depth ? values[j * s.row_step + d] : 0.f;
    v_panels = {value_rows, padded, kPanel};
  }

  PhaseStretches scoring(s.phases, Phase::scores), mixing(s.phases, Phase::context);
  for_row_tiles(length, [&](int64_t row, int rows) {
    float best[kTileRows], total[kTileRows];
    for (int64_t begin = 0; begin < length; begin += kKeyBlock) {
      const int64_t count = length - begin < kKeyBlock ? length - begin : kKeyBlock;
      const int64_t columns = round_up(count, kPanel);
      scoring.run([&] {
        multiply(rows, depth, queries + row * s.row_step, s.row_step,
                 {key_panels + begin * depth, kPanel, depth * kPanel}, {0, columns / kPanel}, {nullptr, 0},
                 scores, kScoreStep, kNoFinish);
      });
      for (int r = 0; r < rows; ++r) {
        float* line = scores + r * kScoreStep;
        for (int64_t c = count; c < columns; ++c) line[c] = kNothing;
        const float largest = row_maximum(line, columns);
        if (begin == 0) {
          best[r] = largest;
          total[r] = exponentiate(line, columns, largest, scale);
          continue;
        }
        const float now = largest > best[r] ? largest : best[r];
        const float shrink = exp(splat((best[r] - now) * scale))[0];
        best[r] = now;
        total[r] = total[r] * shrink + exponentiate(line, columns, now, scale);
        for (int64_t d = 0; d < padded; d += kLanes)
          store(context + r * padded + d, load(context + r * padded + d) * shrink);
      }
      mixing.run([&] {
        multiply(rows, count, scores, kScoreStep,
                 {v_panels.data + begin * v_panels.step, v_panels.step, v_panels.stride},
                 {0, padded / kPanel}, {begin == 0 ? nullptr : context, padded}, context, padded, kNoFinish);
      });
    }
    for (int r = 0; r < rows; ++r) {
      const float share = 1.f / total[r];
      float* out = queries + (row + r) * s.row_step;
      const float* line = context + r * padded;
      int64_t d = 0;
      for (; d + kLanes <= depth; d += kLanes) store(out + d, load(line + d) * share);
      for (; d < depth; ++d) out[d] = line[d] * share;
    }
  });
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
