#include "ops/encode_until_sure.h"

#include <torch/library.h>

#include <cmath>
#include <string>

namespace dynplan {
namespace {

kernels::LinearMap linear_map(const char* op, const char* argument, const at::Tensor& weight,
                              const at::Tensor& bias, int64_t inputs, int64_t outputs = -1) {
  for (const at::Tensor* tensor : {&weight, &bias})
    TORCH_CHECK_TYPE(tensor->is_cpu() && tensor->scalar_type() == at::kFloat && tensor->is_contiguous(), op,
                     ": expected ", argument, " to be dense float32 on the CPU, got ", tensor->scalar_type(),
                     " on ", tensor->device());
  const bool fits = weight.dim() == 2 && weight.size(1) == inputs && weight.size(0) > 0 &&
                    (outputs < 0 || weight.size(0) == outputs) && bias.sizes() == weight.size(0);
  TORCH_CHECK_VALUE(fits, op, ": expected ", argument, " to map ", inputs, " numbers",
                    outputs < 0 ? "" : " to " + std::to_string(outputs), ", got weight ", weight.sizes(),
                    " and bias ", bias.sizes());
  return {weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), inputs, weight.size(0)};
}

}  // namespace

EncodeUntilSureCall check_encode_until_sure(EncodeTokensCall encode, const ExitArguments& given) {
  const char* const op = encode.embed.op;
  const int64_t width = encode.embed.word.size(1),
                layers = static_cast<int64_t>(encode.packed_weights.size());
  size_t rungs = 0;
  for (size_t i = 0; i < given.chain.size(); ++i) {
    const int64_t before = i == 0 ? 0 : given.chain[i - 1];
    TORCH_CHECK_VALUE(given.chain[i] > before && given.chain[i] <= layers, op,
                      ": expected chain to rise within 1..", layers, ", got ", given.chain);
    rungs += given.chain[i] < layers;
  }
  const auto activation = kernels::head_activation_of(given.head_activation);
  TORCH_CHECK_VALUE(activation, op, ": expected head_activation to be none, tanh, gelu or relu, got ",
                    std::string(given.head_activation));
  const auto sureness = kernels::sureness_of(given.sureness);
  TORCH_CHECK_VALUE(sureness, op,
                    ": expected sureness to be confidence, entropy, learned, error or patience, got ",
                    std::string(given.sureness));
  EncodeUntilSureCall call = {encode,      given.chain,      {}, {}, {}, given.temperatures, *activation,
                              *sureness,   given.thresholds, given.budget, given.stream, given.burst, given.sway};
  TORCH_CHECK_VALUE(given.exits.size() == 2 * rungs, op, ": expected exits to be weight and bias of ", rungs,
                    " exits, got ", given.exits.size(), " tensors");
  for (size_t i = 0; i < given.exits.size(); i += 2)
    call.exits.push_back(linear_map(op, "exits", given.exits[i], given.exits[i + 1], width, width));
  TORCH_CHECK_VALUE(given.head.size() == 2 || given.head.size() == 4, op,
                    ": expected head to be weight and bias of one linear map or two, got ",
                    given.head.size(), " tensors");
  for (size_t i = 0; i < given.head.size(); i += 2)
    call.head.push_back(linear_map(op, "head", given.head[i], given.head[i + 1],
                                   i == 0 ? width : call.head.back().outputs));
  const size_t per_rung = *sureness == kernels::Sureness::learned ? 2
                          : *sureness == kernels::Sureness::error ? 4
                                                                  : 0;
  TORCH_CHECK_VALUE(given.measures.size() == per_rung * rungs, op, ": expected measures to be ",
                    per_rung * rungs, " tensors for ", std::string(given.sureness), " at ", rungs,
                    " exits, got ", given.measures.size());
  const bool tempered = *sureness == kernels::Sureness::confidence;
  TORCH_CHECK_VALUE(!tempered || given.temperatures.size() == rungs, op,
                    ": expected temperatures of ", rungs, " exits, got ", given.temperatures.size());
  for (const double temperature : given.temperatures)
    TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), op,
                      ": expected temperatures to be above 0, got ", temperature);
  for (size_t i = 0; i < per_rung * rungs; i += 2) {
    const bool second = i % per_rung == 2;
    const int64_t inputs = second ? call.measures.back().outputs : width + (per_rung == 4);
    call.measures.push_back(linear_map(op, "measures", given.measures[i], given.measures[i + 1], inputs,
                                       second || per_rung == 2 ? 1 : -1));
  }
  TORCH_CHECK_VALUE(!given.thresholds.empty(), op, ": expected a threshold at least, got none");
  TORCH_CHECK_VALUE(given.budget >= 0 && given.budget <= 1, op, ": expected budget to be within 0..1, got ",
                    given.budget);
  const auto bounded = [](double value) { return value >= 0 && value < 2147483648.; };
  TORCH_CHECK_VALUE(bounded(given.burst) && bounded(given.sway), op,
                    ": expected burst and sway to be within 0..2^31, got ", given.burst, " and ", given.sway);
  return call;
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def(
      "encode_until_sure(Tensor input_ids, Tensor? attention_mask, Tensor? token_type_ids, Tensor word, "
      "Tensor type, Tensor position, Tensor norm_weight, Tensor norm_bias, float norm_eps, "
      "int? padding_idx, Tensor[] packed_weights, int num_heads, str activation, float eps, "
      "bool reads_first, int[] chain, Tensor[] exits, Tensor[] head, str head_activation, str sureness, "
      "Tensor[] measures, float[] temperatures, float[] thresholds, float budget, Tensor(a!)? stream, float burst, float sway) "
      "-> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace dynplan
