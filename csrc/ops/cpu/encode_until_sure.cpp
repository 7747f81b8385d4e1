#include "ops/encode_until_sure.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "kernels/planning/stream_budget.h"
#include "ops/cpu/encoder_phases.h"
#include "ops/cpu/parallel.h"
#include "ops/cpu/token_encoder.h"
#include "ops/stream_budget.h"

namespace dynplan {
namespace {

// Who goes on, within the contract of the batch, or of the stream.
class Contract {
 public:
  Contract(const EncodeUntilSureCall& call, const TokenEncoder& encoder)
      : call_(call),
        cu_seqlens_(encoder.cu_seqlens()),
        rates_{call.budget, call.burst, static_cast<int64_t>(call.encode.packed_weights.size())} {
    if (call.stream) {
      const auto lock = lock_streams();
      kernels::arrive(counts(), cu_seqlens_, encoder.samples());
      return;
    }
    kernels::arrive(batch_, cu_seqlens_, encoder.samples());
    const double share = call.budget * static_cast<double>(rates_.layers);
    caps_ = {std::floor(static_cast<double>(batch_.samples * rates_.layers) * call.budget + 1e-6),
             std::floor(static_cast<double>(batch_.tokens) * share + 1e-6)};
  }

  // Clears `wanted` of those that cannot be given `steps` layers more, and counts the others. The first layers
  // of a batch (no priority) are within its contract: so the chain was chosen.
  void spend(const float* priority, int64_t steps, std::vector<uint8_t>& wanted) {
    if (call_.stream) {
      const auto lock = lock_streams();
      kernels::admit(priority, cu_seqlens_, steps, kernels::room(counts(), rates_), wanted);
      kernels::count(counts(), wanted, cu_seqlens_, steps);
      return;
    }
    if (priority != nullptr)
      kernels::admit(priority, cu_seqlens_, steps,
                     {caps_.samples - static_cast<double>(batch_.sample_layers),
                      caps_.tokens - static_cast<double>(batch_.token_layers)},
                     wanted);
    kernels::count(batch_, wanted, cu_seqlens_, steps);
  }

  // Sureness to leave with. The price follows the stream's level: a full bucket is generous, an empty one
  // mean.
  double threshold() const {
    double budget = call_.budget;
    if (call_.stream) {
      const auto lock = lock_streams();
      budget *= 1 + call_.sway * (2 * kernels::level(counts(), rates_) - 1);
    }
    const double last = static_cast<double>(call_.thresholds.size() - 1);
    return call_.thresholds[static_cast<size_t>(std::clamp(budget * last + 1e-6, 0., last))];
  }

 private:
  kernels::StreamCounts& counts() const { return stream_counts(call_.encode.embed.op, *call_.stream); }

  const EncodeUntilSureCall& call_;
  const int32_t* cu_seqlens_;
  kernels::StreamRates rates_;
  kernels::StreamCounts batch_ = {};  // of this batch alone, where there is no stream
  kernels::Room caps_ = {};
};

// What samples answer at the exits, and what the exits give the model's head to read.
class Answers {
 public:
  Answers(const EncodeUntilSureCall& call, const TokenEncoder& encoder)
      : call_(call),
        encoder_(encoder),
        samples_(encoder.samples()),
        width_(encoder.width()),
        pooled_(samples_ * (width_ + 1)),
        states_(call.exits.size()),
        patience_(samples_) {}

  // Reads the listed samples at an exit; the means of their rows stay for sureness().
  void read(size_t rung, const std::vector<int64_t>& samples) {
    states_[rung].resize(samples_ * width_);
    const int32_t* const offsets = encoder_.cu_seqlens();
    at_parallel(static_cast<int64_t>(samples.size()), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels::mean_of_rows(encoder_.packed(), offsets[samples[i]], offsets[samples[i] + 1], width_,
                              pooled_.data() + samples[i] * width_);
    });
    kernels::apply(call_.exits[rung], kernels::HeadActivation::none, samples, pooled_.data(),
                   states_[rung].data(), at_parallel);
  }

  // How sure the model's own head is of the samples that were read.
  std::vector<float> sureness(size_t rung, const std::vector<int64_t>& samples) {
    std::vector<float> inside, answers = states_[rung], sure(samples_);
    for (size_t i = 0; i < call_.head.size(); ++i) {
      inside.swap(answers);
      answers.resize(samples_ * call_.head[i].outputs);
      kernels::apply(call_.head[i], i == 0 && call_.head.size() == 2 ? call_.head_activation
                                                                      : kernels::HeadActivation::none,
                     samples, inside.data(), answers.data(), at_parallel);
    }
    const int64_t classes = call_.head.back().outputs;
    for (const int64_t b : samples)
      sure[b] = sureness_of(rung, b, answers.data() + b * classes, classes);
    return sure;
  }

  const float* state(size_t rung, int64_t sample) const { return states_[rung].data() + sample * width_; }
  bool was_read(size_t rung) const { return !states_[rung].empty(); }

 private:
  float sureness_of(size_t rung, int64_t b, const float* answer, int64_t classes) {
    const float* const pooled = pooled_.data() + b * width_;
    switch (call_.sureness) {
      case kernels::Sureness::entropy:
        return kernels::negative_entropy(answer, classes);
      case kernels::Sureness::patience:
        return patience_[b].see(answer, classes);
      case kernels::Sureness::learned: {
        const kernels::LinearMap& map = call_.measures[rung];
        return map.bias[0] + kernels::dot(map.weight, pooled, map.inputs);
      }
      case kernels::Sureness::error:
        return -expected_error(rung, pooled, answer[0]);
      default:
        return kernels::confidence(answer, classes, static_cast<float>(call_.temperatures[rung]));
    }
  }

  // A network of the mean of the rows and the answer.
  float expected_error(size_t rung, const float* pooled, float answer) const {
    const kernels::LinearMap &first = call_.measures[2 * rung], &second = call_.measures[2 * rung + 1];
    float error = second.bias[0];
    for (int64_t o = 0; o < first.outputs; ++o) {
      const float* const weight = first.weight + o * first.inputs;
      const float inside = first.bias[o] + kernels::dot(weight, pooled, width_) + weight[width_] * answer;
      error += second.weight[o] * kernels::activate(kernels::HeadActivation::gelu, inside);
    }
    return error;
  }

  const EncodeUntilSureCall& call_;
  const TokenEncoder& encoder_;
  int64_t samples_, width_;
  std::vector<float> pooled_;                // (B, H)
  std::vector<std::vector<float>> states_;   // of each exit that was read, (B, H)
  std::vector<kernels::Patience> patience_;  // (B,)
};

std::vector<int64_t> listed(const std::vector<uint8_t>& chosen) {
  std::vector<int64_t> indices;
  for (size_t b = 0; b < chosen.size(); ++b)
    if (chosen[b] != 0) indices.push_back(static_cast<int64_t>(b));
  return indices;
}

std::tuple<at::Tensor, at::Tensor> encode_until_sure(const EncodeUntilSureCall& call) {
  const int64_t layers = static_cast<int64_t>(call.encode.packed_weights.size());
  TokenEncoder encoder(call.encode);
  const int64_t samples = encoder.samples(), width = encoder.width();
  at::Tensor keep = at::zeros({samples, layers}, at::TensorOptions().dtype(at::kBool));
  auto* const plan = static_cast<uint8_t*>(keep.mutable_data_ptr());
  Contract contract(call, encoder);
  Answers answers(call, encoder);
  kernels::PhaseTimes* const phases = encoder_phase_times();

  const auto run = [&](int64_t first, int64_t last, const std::vector<uint8_t>& going) {
    for (int64_t b = 0; b < samples; ++b) std::fill(plan + b * layers + first, plan + b * layers + last, going[b]);
    encoder.run(first, last, {kernels::truths(plan + first), layers, 1});
  };
  std::vector<uint8_t> going(samples);
  for (int64_t b = 0; b < samples; ++b) going[b] = encoder.cu_seqlens()[b + 1] > encoder.cu_seqlens()[b];
  const at::IntArrayRef chain = call.chain;
  for (size_t rung = 0; rung < chain.size(); ++rung) {
    const int64_t depth = rung == 0 ? 0 : chain[rung - 1], following = chain[rung];
    if (rung == 0) {
      contract.spend(nullptr, following, going);
    } else {
      const kernels::PhaseTimer timer(phases, kernels::Phase::answers, at::get_num_threads());
      const std::vector<int64_t> asked = listed(going);
      answers.read(rung - 1, asked);
      std::vector<float> priority = answers.sureness(rung - 1, asked);
      // In a batch the contract alone decides who goes on to the end.
      if (call.stream || rung + 1 < chain.size()) {
        const auto threshold = static_cast<float>(contract.threshold());
        for (const int64_t b : asked) going[b] = priority[b] < threshold;
      }
      for (float& one : priority) one = -one;
      contract.spend(priority.data(), following - depth, going);
    }
    if (std::none_of(going.begin(), going.end(), [](uint8_t one) { return one != 0; })) break;
    run(depth, following, going);
  }

  at::Tensor out = encoder.finish();
  const kernels::PhaseTimer timer(phases, kernels::Phase::answers, at::get_num_threads());
  float* const first_position = out.mutable_data_ptr<float>();
  const int64_t step = samples > 0 ? out.numel() / samples : 0;
  for (size_t rung = 0; rung < call.exits.size(); ++rung) {
    const int64_t depth = chain[rung];
    std::vector<int64_t> left;
    for (int64_t b = 0; b < samples; ++b)
      if (plan[b * layers + depth - 1] != 0 && plan[b * layers + depth] == 0) left.push_back(b);
    if (left.empty()) continue;
    if (!answers.was_read(rung)) answers.read(rung, left);
    for (const int64_t b : left)
      std::copy_n(answers.state(rung, b), width, first_position + b * step);
  }
  return {std::move(out), std::move(keep)};
}

std::tuple<at::Tensor, at::Tensor> encode_until_sure_cpu(
    const at::Tensor& input_ids, const std::optional<at::Tensor>& attention_mask,
    const std::optional<at::Tensor>& token_type_ids, const at::Tensor& word, const at::Tensor& type,
    const at::Tensor& position, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
    std::optional<int64_t> padding_idx, at::TensorList packed_weights, int64_t num_heads,
    c10::string_view activation, double eps, bool reads_first, at::IntArrayRef chain, at::TensorList exits,
    at::TensorList head, c10::string_view head_activation, c10::string_view sureness, at::TensorList measures,
    at::ArrayRef<double> temperatures, at::ArrayRef<double> thresholds, double budget, const std::optional<at::Tensor>& stream, double burst,
    double sway) {
  const std::optional<at::Tensor> every;
  const EncodeTokensCall encode =
      check_encode_tokens({"encode_until_sure", input_ids, attention_mask, token_type_ids, word, type, position,
                           norm_weight, norm_bias, norm_eps, padding_idx},
                          every, packed_weights, num_heads, activation, eps, reads_first);
  return encode_until_sure(check_encode_until_sure(
      encode, {chain, exits, head, head_activation, sureness, measures, temperatures, thresholds, budget, stream, burst, sway}));
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("encode_until_sure", &encode_until_sure_cpu);
}

}  // namespace dynplan
