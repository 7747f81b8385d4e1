#include "ops/encode_tokens.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels/packing/build_dispatch.h"
#include "kernels/packing/pack.h"
#include "ops/cpu/conditional_encoder_layer.h"
#include "ops/cpu/embed_tokens.h"
#include "ops/cpu/encoder_phases.h"
#include "ops/cpu/parallel.h"

namespace dynplan {
namespace {

// The dispatch of all layers, in one piece of memory.
class Schedule {
 public:
  Schedule(const EncodeTokensCall& call, const Tokens& tokens)
      : layers_(static_cast<int64_t>(call.packed_weights.size())),
        capacity_(tokens.indices.size(0)),
        samples_(tokens.cu_seqlens.size(0) - 1),
        memory_(layers_ * (capacity_ + samples_ + 3)) {
    const kernels::Truth kept = {1};
    kernels::BuildDispatchParams params = {.keep = &kept,
                                           .sample_stride = 0,
                                           .layer_stride = 0,
                                           .cu_seqlens = tokens.cu_seqlens.const_data_ptr<int32_t>(),
                                           .samples = samples_,
                                           .layers = layers_,
                                           .capacity = capacity_,
                                           .rows = rows(),
                                           .active_cu_seqlens = cu_seqlens(),
                                           .counts = counts()};
    if (call.keep) {
      params.keep = kernels::truths(call.keep->const_data_ptr());
      params.sample_stride = call.keep->stride(0), params.layer_stride = call.keep->stride(1);
    }
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

at::Tensor encode(const EncodeTokensCall& call) {
  const int64_t batch = call.embed.input_ids.size(0), length = call.embed.input_ids.size(1);
  kernels::PhaseTimes* const phases = encoder_phase_times();
  std::optional<kernels::PhaseTimer> timer(std::in_place, phases, kernels::Phase::dispatch,
                                           at::get_num_threads());
  TokenRows rows = find_token_rows(call.embed);
  const int64_t tokens = rows.params.tokens, width = rows.params.width;
  const bool padded = tokens < batch * length;
  if (call.reads_first && padded) check_first(call.embed.op, rows.tokens, length);
  const PackedStack weights = read_packed(call.embed.op, call.packed_weights, width);
  Schedule schedule(call, rows.tokens);
  timer.reset();

  const at::TensorOptions options = call.embed.word.options();
  const at::Tensor out =
      padded ? at::zeros({batch, length, width}, options) : at::empty({batch, length, width}, options);
  const at::Tensor packed = padded ? at::empty({tokens, width}, options) : out;
  if (tokens == 0) return out;
  rows.params.packed = packed.mutable_data_ptr<float>();
  const auto embed = [&](int64_t begin, int64_t end) {
    const kernels::PhaseTimer embedding(phases, kernels::Phase::embed);
    kernels::embed_rows(rows.params, begin, end);
  };
  const kernels::RangeBody fill = embed;
  run_encoder({.hidden = rows.params.packed,
               .row_type = kernels::RowType::float32,
               .rows = schedule.rows(),
               .cu_seqlens = schedule.cu_seqlens(),
               .counts = schedule.counts(),
               .layers = static_cast<int64_t>(call.packed_weights.size()),
               .capacity = tokens,
               .samples = batch,
               .hidden_size = width,
               .heads = call.num_heads,
               .activation = call.activation,
               .eps = call.eps,
               .fill = &fill},
              weights, schedule.most());
  if (!padded) return out;
  timer.emplace(phases, kernels::Phase::restore, at::get_num_threads());
  kernels::unpack_rows({.packed = static_cast<const char*>(packed.const_data_ptr()),
                        .indices = rows.params.indices,
                        .tokens = tokens,
                        .row_bytes = width * static_cast<int64_t>(sizeof(float)),
                        .hidden = static_cast<char*>(out.mutable_data_ptr())},
                       at_parallel);
  return out;
}

at::Tensor encode_tokens_cpu(const at::Tensor& input_ids, const std::optional<at::Tensor>& attention_mask,
                             const std::optional<at::Tensor>& token_type_ids, const at::Tensor& word,
                             const at::Tensor& type, const at::Tensor& position,
                             const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
                             std::optional<int64_t> padding_idx, const std::optional<at::Tensor>& keep,
                             at::TensorList packed_weights, int64_t num_heads, c10::string_view activation,
                             double eps, bool reads_first) {
  return encode(check_encode_tokens({"encode_tokens", input_ids, attention_mask, token_type_ids, word, type,
                                     position, norm_weight, norm_bias, norm_eps, padding_idx},
                                    keep, packed_weights, num_heads, activation, eps, reads_first));
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("encode_tokens", &encode_tokens_cpu);
}

}  // namespace dynplan
