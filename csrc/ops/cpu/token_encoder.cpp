#include "ops/cpu/token_encoder.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "kernels/packing/build_dispatch.h"
#include "kernels/packing/pack.h"
#include "ops/cpu/encoder_phases.h"
#include "ops/cpu/parallel.h"

namespace dynplan {
namespace {

// The dispatch of some layers, in one piece of memory.
class Schedule {
 public:
  Schedule(const KeptSamples& kept, int64_t layers, const Tokens& tokens)
      : layers_(layers),
        capacity_(tokens.indices.size(0)),
        samples_(tokens.cu_seqlens.size(0) - 1),
        memory_(layers_ * (capacity_ + samples_ + 3)) {
    const kernels::BuildDispatchParams params = {.keep = kept.keep,
                                           .sample_stride = kept.sample_stride,
                                           .layer_stride = kept.layer_stride,
                                           .cu_seqlens = tokens.cu_seqlens.const_data_ptr<int32_t>(),
                                           .samples = samples_,
                                           .layers = layers_,
                                           .capacity = capacity_,
                                           .rows = rows(),
                                           .active_cu_seqlens = cu_seqlens(),
                                           .counts = counts()};
    constexpr int64_t kWorthSharing = 1 << 15;  // rows written
    if (layers_ * capacity_ < kWorthSharing)
      kernels::build_dispatch(params, kernels::serial);
    else
      kernels::build_dispatch(params, at_parallel);
    for (int64_t layer = 0; layer < layers_; ++layer)
      most_ = std::max<int64_t>(most_, counts()[2 * layer + 1]);
  }

  int32_t* rows() { return memory_.data(); }
  int32_t* cu_seqlens() { return rows() + layers_ * capacity_; }
  int32_t* counts() { return cu_seqlens() + layers_ * (samples_ + 1); }
  int64_t most() const { return most_; }  // active rows in any layer

 private:
  int64_t layers_, capacity_, samples_, most_ = 0;
  std::vector<int32_t> memory_;
};

void check_first(const char* op, const Tokens& tokens, int64_t length) {
  const int32_t *indices = tokens.indices.const_data_ptr<int32_t>(),
                *offsets = tokens.cu_seqlens.const_data_ptr<int32_t>();
  for (int64_t b = 0; b + 1 < tokens.cu_seqlens.size(0); ++b)
    TORCH_CHECK_VALUE(offsets[b] == offsets[b + 1] || indices[offsets[b]] == b * length, op,
                      ": expected attention_mask to keep the first position of every sample, got padding "
                      "there in sample ",
                      b);
}

}  // namespace

TokenEncoder::TokenEncoder(const EncodeTokensCall& call)
    : call_(call), samples_(call.embed.input_ids.size(0)), length_(call.embed.input_ids.size(1)) {
  const kernels::PhaseTimer timer(encoder_phase_times(), kernels::Phase::dispatch, at::get_num_threads());
  rows_ = find_token_rows(call.embed);
  const bool padded = tokens() < samples_ * length_;
  if (call.reads_first && padded) check_first(call.embed.op, rows_.tokens, length_);
  weights_ = read_packed(call.embed.op, call.packed_weights, width());
  const at::TensorOptions options = call.embed.word.options();
  out_ = padded ? at::zeros({samples_, length_, width()}, options)
                : at::empty({samples_, length_, width()}, options);
  packed_ = padded ? at::empty({tokens(), width()}, options) : out_;
  rows_.params.packed = packed_.mutable_data_ptr<float>();
}

void TokenEncoder::run(int64_t first, int64_t last, const KeptSamples& kept) {
  if (tokens() == 0) return;
  Schedule schedule = [&] {
    const kernels::PhaseTimer timer(encoder_phase_times(), kernels::Phase::dispatch, at::get_num_threads());
    return Schedule(kept, last - first, rows_.tokens);
  }();
  const auto body = [&](int64_t begin, int64_t end) { embed(begin, end); };
  const kernels::RangeBody fill = body;
  run_encoder({.hidden = rows_.params.packed,
               .row_type = kernels::RowType::float32,
               .rows = schedule.rows(),
               .cu_seqlens = schedule.cu_seqlens(),
               .counts = schedule.counts(),
               .layers = last - first,
               .capacity = tokens(),
               .samples = samples_,
               .hidden_size = width(),
               .heads = call_.num_heads,
               .activation = call_.activation,
               .eps = call_.eps,
               .fill = embedded_ ? nullptr : &fill},
              weights_, schedule.most(), first);
  embedded_ = true;
}

void TokenEncoder::embed(int64_t begin, int64_t end) {
  const kernels::PhaseTimer timer(encoder_phase_times(), kernels::Phase::embed);
  kernels::embed_rows(rows_.params, begin, end);
}

at::Tensor TokenEncoder::finish() {
  if (!embedded_)
    at_parallel(tokens(), kernels::kFillGrain, [&](int64_t begin, int64_t end) { embed(begin, end); });
  if (tokens() < samples_ * length_ && tokens() > 0) {
    const kernels::PhaseTimer timer(encoder_phase_times(), kernels::Phase::restore, at::get_num_threads());
    kernels::unpack_rows({.packed = static_cast<const char*>(packed_.const_data_ptr()),
                          .indices = rows_.params.indices,
                          .tokens = tokens(),
                          .row_bytes = width() * static_cast<int64_t>(sizeof(float)),
                          .hidden = static_cast<char*>(out_.mutable_data_ptr())},
                         at_parallel);
  }
  return out_;
}

}  // namespace dynplan
