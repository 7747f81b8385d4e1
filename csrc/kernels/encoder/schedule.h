// Three ways to share an encoder's work between threads, with one result to the bit:
//
//   flow        many samples: pieces of whole sequences, from layer to layer without a barrier (flow.h).
//   by rows     few samples, many rows: QKV over row tiles, attention over (sequence, head), and everything
//               after it over row tiles again, in blocks whose activations stay in cache; three stages a
//               layer.
//   by columns  few rows (one short text): a thread owns panels of each weight, so that no weight is streamed
//               from memory twice; a stage for each product and each norm.
//
// Included once per instruction set (isa/conditional_encoder_layer_*.cpp).
#pragma once

#include "kernels/encoder/layer.h"
#include "kernels/encoder/scratch.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Rows of a block of the QKV product.
constexpr int64_t kGatherRows = 192;

inline int64_t larger(int64_t a, int64_t b) {
  return a < b ? b : a;
}

// [begin, end) in blocks of at most `most` rows, as even as can be.
template <class Body>
void for_blocks(int64_t begin, int64_t end, int64_t most, Body body) {
  const int64_t rows = end - begin, blocks = (rows + most - 1) / most;
  for (int64_t b = 0; b < blocks; ++b) body(begin + rows * b / blocks, begin + rows * (b + 1) / blocks);
}

// The thread's memory for products of at most `rows` rows with such weights as ask for it.
inline void reserve_pairs(const ConditionalEncoderParams& p, int64_t rows) {
  const WeightType type = p.layers > 0 ? layer_of(p, 0).at.type : WeightType::float32;
  if (type == WeightType::bfloat16) thread_pairs(rows, larger(p.hidden_size, p.intermediate_size));
}

inline int64_t longest_sequence(const Layer& l) {
  int64_t longest = 0;
  for (int64_t s = 0; s < l.sequences; ++s) longest = larger(longest, l.cu_seqlens[s + 1] - l.cu_seqlens[s]);
  return longest;
}

inline AttentionShape attention_shape(const Layer& l, int64_t longest) {
  return {l.p.hidden_size, l.p.heads, l.qkv_step, longest, l.p.phases};
}

// Attention of all sequences, cut into ranges of equal cost: a head of a sequence of n rows costs n (n + c),
// with c for what does not grow with n^2 (transposing keys, reading q, k and v).
inline void attend_all(const Layer& l, Member& member, float* qkv, float* scratch) {
  constexpr int64_t kLinearCost = 32, kRanges = 128;
  int64_t total = 0;
  for (int64_t s = 0; s < l.sequences; ++s) {
    const int64_t n = l.cu_seqlens[s + 1] - l.cu_seqlens[s];
    total += n * (n + kLinearCost);
  }
  const AttentionShape shape = attention_shape(l, longest_sequence(l));
  total *= l.p.heads;
  member.share_out(kRanges, [&](int64_t first, int64_t last, int64_t) {
    const PhaseTimer timer(l.p.phases, Phase::attention);
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

inline int64_t scratch_by_rows(const Layer& l) {
  const int64_t block = block_rows(l.p.hidden_size, l.p.intermediate_size) * (l.up_step + 2 * l.row_step);
  return larger(larger(kGatherRows * l.row_step, block),
                attention_scratch_floats(attention_shape(l, longest_sequence(l))));
}

inline void run_by_rows(const Layer& l, Member& member, float* qkv, float* scratch) {
  const int64_t tiles = (l.active + kTileRows - 1) / kTileRows;
  const auto row = [&](int64_t tile) { return l.active * tile / tiles; };

  member.share_out(tiles, [&](int64_t first, int64_t last, int64_t) {
    for_blocks(row(first), row(last), kGatherRows, [&](int64_t begin, int64_t end) {
      gather_rows(l, begin, end - begin, scratch);
      project_qkv(l, end - begin, operand(l, end - begin, scratch, l.row_step), qkv + begin * l.qkv_step,
                  all_panels(3 * l.p.hidden_size));
    });
  });
  attend_all(l, member, qkv, scratch);

  const int64_t most = block_rows(l.p.hidden_size, l.p.intermediate_size);
  member.share_out(tiles, [&](int64_t first, int64_t last, int64_t) {
    float* y = scratch + most * l.row_step;
    for_blocks(row(first), row(last), most, [&](int64_t begin, int64_t end) {
      gather_rows(l, begin, end - begin, scratch);
      finish_rows(l, begin, end - begin, qkv + begin * l.qkv_step, scratch, y, y + most * l.row_step);
    });
  });
}

inline int64_t scratch_by_columns(const Layer& l) {
  return attention_scratch_floats(attention_shape(l, longest_sequence(l)));
}

// gathered: the rows are where the last layer left them. stay: the next layer finds them there.
inline void run_by_columns(const Layer& l, Member& member, float* qkv, float* scratch, bool gathered,
                           bool stay) {
  const int64_t rows = l.active;
  float* x = qkv + rows * l.qkv_step;
  float* y = x + rows * l.row_step;
  float* up = y + rows * l.row_step;
  // A range is whole tiles wide.
  const auto over_panels = [&](int64_t columns, auto body) {
    const int64_t panels = round_up(columns, kPanel) / kPanel,
                  units = (panels + kTilePanels - 1) / kTilePanels;
    const auto panel = [&](int64_t unit) { return unit == units ? panels : unit * kTilePanels; };
    member.share_out(units, [&](int64_t first, int64_t last, int64_t next) {
      body(Range{panel(first), panel(last), next == units ? -1 : panel(next)});
    });
  };
  const auto over_rows = [&](auto body) {
    const int64_t units = (rows + kNormRows - 1) / kNormRows;
    member.share_out(units, [&](int64_t first, int64_t last, int64_t) {
      body(first * kNormRows, (last == units ? rows : last * kNormRows) - first * kNormRows);
    });
  };
  const int64_t width = l.p.hidden_size;
  if (!gathered)
    over_rows([&](int64_t first, int64_t count) { gather_rows(l, first, count, x + first * l.row_step); });
  const Operand input = operand(l, rows, x, l.row_step);
  over_panels(3 * width, [&](Range panels) { project_qkv(l, rows, input, qkv, panels); });
  attend_all(l, member, qkv, scratch);
  const Operand context = operand(l, rows, qkv, l.qkv_step);
  over_panels(width, [&](Range panels) { project_context(l, rows, context, x, y, panels); });
  over_rows([&](int64_t first, int64_t count) { first_norm(l, count, y + first * l.row_step); });
  const Operand normed = operand(l, rows, y, l.row_step);
  over_panels(l.p.intermediate_size, [&](Range panels) { expand(l, rows, normed, up, panels); });
  const Operand active = up_operand(l, rows, up);
  over_panels(width, [&](Range panels) { contract(l, rows, active, y, x, panels); });
  over_rows([&](int64_t first, int64_t count) {
    second_norm_and_scatter(l, first, count, x + first * l.row_step, stay);
  });
}

inline void run_together(const ConditionalEncoderParams& p, const Team& team, Parallel parallel) {
  int64_t floats = 0;
  const auto by_columns = [](const Layer& l) { return l.active <= kFewRows; };
  std::vector<Layer> layers;  // that have work
  for (int64_t index = 0; index < p.layers; ++index) {
    const Layer l = layer_of(p, index);
    if (l.active == 0) continue;
    floats = larger(floats, by_columns(l) ? scratch_by_columns(l) : scratch_by_rows(l));
    layers.push_back(l);
  }
  // Whether run_by_columns leaves a layer's rows where the next one wants them. Hidden states in bfloat16 are
  // rounded between layers, wherever the rows come from.
  const auto stay = [&](size_t i) {
    return i + 1 < layers.size() && p.row_type == RowType::float32 && by_columns(layers[i]) &&
           layers[i].active == layers[i + 1].active &&
           std::equal(layers[i].rows, layers[i].rows + layers[i].active, layers[i + 1].rows);
  };
  parallel(p.workers, 1, [&](int64_t, int64_t) {
    // First of all: nothing may throw once others wait for us.
    float* scratch = thread_scratch(floats);
    reserve_pairs(p, larger(larger(kGatherRows, kFewRows), block_rows(p.hidden_size, p.intermediate_size)));
    Member member(team);
    if (p.fill != nullptr)
      member.share_out(p.capacity, [&](int64_t begin, int64_t end, int64_t) { (*p.fill)(begin, end); });
    bool gathered = false;
    for (size_t i = 0; i < layers.size(); ++i) {
      const bool stays = stay(i);
      if (by_columns(layers[i]))
        run_by_columns(layers[i], member, p.workspace, scratch, gathered, stays);
      else
        run_by_rows(layers[i], member, p.workspace, scratch);
      gathered = stays;
    }
  });
}

// Floats of a thread's buffers for pieces of at most `rows` rows, finished in blocks of at most `most`.
inline int64_t piece_floats(const Layer& l, int64_t rows, int64_t most) {
  return rows * (l.row_step + larger(l.qkv_step, l.up_step)) + most * (l.row_step + l.up_step);
}

inline void run_piece(const Layer& l, const Piece& piece, int64_t longest, int64_t most, float* scratch) {
  const int64_t begin = l.cu_seqlens[piece.first], rows = l.cu_seqlens[piece.last] - begin;
  float* x = scratch;
  float* qkv = x + rows * l.row_step;
  float* y = qkv + rows * larger(l.qkv_step, l.up_step);
  // One block needs its QKV no more when the feed-forward begins, and has the memory in cache.
  float* up = rows <= most ? qkv : y + most * l.row_step;
  gather_rows(l, begin, rows, x);
  project_qkv(l, rows, operand(l, rows, x, l.row_step), qkv, all_panels(3 * l.p.hidden_size));
  {
    const PhaseTimer timer(l.p.phases, Phase::attention);
    const AttentionShape shape = attention_shape(l, longest);
    float* free = scratch + piece_floats(l, rows, most);
    for (int64_t s = piece.first; s < piece.last; ++s)
      for (int64_t head = 0, n = l.cu_seqlens[s + 1] - l.cu_seqlens[s]; head < l.p.heads && n > 0; ++head)
        attend(qkv + (l.cu_seqlens[s] - begin) * l.qkv_step, n, head, shape, free);
  }
  for_blocks(0, rows, most, [&](int64_t from, int64_t to) {
    finish_rows(l, begin + from, to - from, qkv + from * l.qkv_step, x + from * l.row_step, y, up);
  });
}

inline void run_flow(const ConditionalEncoderParams& p, Flow& flow, Parallel parallel) {
  // A piece ends with a whole sequence; a block half as large again beats two halves.
  const int64_t most = block_rows(p.hidden_size, p.intermediate_size) * 3 / 2;
  const Layer any = layer_of(p, 0);
  const int64_t floats =
      piece_floats(any, flow.rows(), most) + attention_scratch_floats(attention_shape(any, flow.longest()));
  parallel(p.workers, 1, [&](int64_t, int64_t) {
    // First of all: nothing may throw once others wait for us.
    float* scratch = thread_scratch(floats);
    reserve_pairs(p, larger(flow.rows(), most));
    while (const Piece* piece = flow.take()) {
      wait_until([&] { return flow.is_ready(*piece); });
      run_piece(layer_of(p, piece->layer), *piece, flow.longest(), most, scratch);
      flow.finish(*piece);
    }
  });
}

void conditional_encoder(const ConditionalEncoderParams& p, Sharing sharing, Parallel parallel) {
  if (sharing.flow != nullptr)
    run_flow(p, *sharing.flow, parallel);
  else
    run_together(p, *sharing.team, parallel);
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
