#include "ops/encode_tokens.h"

#include <torch/library.h>

#include "ops/cpu/token_encoder.h"

namespace dynplan {
namespace {

at::Tensor encode_tokens_cpu(const at::Tensor& input_ids, const std::optional<at::Tensor>& attention_mask,
                             const std::optional<at::Tensor>& token_type_ids, const at::Tensor& word,
                             const at::Tensor& type, const at::Tensor& position,
                             const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
                             std::optional<int64_t> padding_idx, const std::optional<at::Tensor>& keep,
                             at::TensorList packed_weights, int64_t num_heads, c10::string_view activation,
                             double eps, bool reads_first) {
  const EncodeTokensCall call =
      check_encode_tokens({"encode_tokens", input_ids, attention_mask, token_type_ids, word, type, position,
                           norm_weight, norm_bias, norm_eps, padding_idx},
                          keep, packed_weights, num_heads, activation, eps, reads_first);
  TokenEncoder encoder(call);
  constexpr kernels::Truth kEvery = {1};
  encoder.run(0, static_cast<int64_t>(packed_weights.size()),
              keep ? KeptSamples{kernels::truths(keep->const_data_ptr()), keep->stride(0), keep->stride(1)}
                   : KeptSamples{&kEvery, 0, 0});
  return encoder.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("encode_tokens", &encode_tokens_cpu);
}

}  // namespace dynplan
